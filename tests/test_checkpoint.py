"""The states that a run saves (training/checkpoint.py): whole or refused, and when they are due."""

from training import checkpoint
from utils import UserError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import same


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_cut_and_no_flipped_bit_goes_unnoticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("state") / "step00000001.pt"
    tensors = {
        "b": torch.arange(5, dtype=torch.uint8),
        "a": torch.randn(6),
        "h": torch.randn(3).half(),
    }
    checkpoint.save(path, {"x": [0.1, None]}, tensors)
    assert checkpoint.is_whole(path)
    saved = checkpoint.StateFile(path)
    assert saved.scalars == {"x": [0.1, None]} and all(
        torch.equal(saved.read(k, v), v) for k, v in tensors.items()
    )
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:place])
    assert not checkpoint.is_whole(path)
    path.write_bytes(
        whole[:place]
        + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))])
        + whole[place + 1 :]
    )
    if checkpoint.is_whole(path):  # the bit was of padding
        again = checkpoint.StateFile(path)
        assert again.scalars == saved.scalars and same(again.tensors, tensors)


def test_a_state_of_another_shape_or_dtype_is_refused(tmp_path):
    checkpoint.save(tmp_path / "s", {}, {"a": torch.zeros(4)})
    saved = checkpoint.StateFile(tmp_path / "s")
    for name, like in [("a", torch.zeros(5)), ("a", torch.zeros(4).half()), ("b", torch.zeros(4))]:
        with pytest.raises(UserError, match="the state of another run"):
            saved.read(name, like)


def test_when_a_state_is_due(tmp_path):
    by_steps, by_time = (checkpoint.Checkpoints(tmp_path, every) for every in ("5", "0.5m"))
    assert [step for step in range(1, 21) if by_steps.due(step, 0.0)] == [5, 10, 15, 20]
    assert not by_time.due(9, 29) and by_time.due(9, 31)
    by_time.step, by_time.saved_at, by_time.cost_s = 9, 31, 2.0
    # two seconds are 2 % of a hundred
    assert not by_time.due(20, 31 + 99) and by_time.due(20, 31 + 101)
