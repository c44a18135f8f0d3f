"""Losses that are not finite: what train.py makes of them."""

import json
import math

import train
from training import checkpoint
from utils import UserError

import pytest
import torch
from runs import VANILLA, arguments, steps_of

# ------------------------------------------------------------------------------- not finite numbers


def test_a_loss_that_is_not_finite_is_skipped_and_counted(workshop, tmp_path, losses, capsys):
    losses[2] = losses[3] = losses[5] = lambda: math.nan
    train.main(arguments(workshop, tmp_path / "run", VANILLA))
    assert steps_of(tmp_path / "run") == [1, 4, 6]
    assert json.loads((tmp_path / "run/run.json").read_text())["summary"]["steps_skipped"] == 3
    said = capsys.readouterr().out
    command = (
        f"python eval.py --model {workshop}/dense --mask {tmp_path}/run --ppl TEXT --seqlen 256   "
        f"  # TEXT: of the same kind as {workshop}/text.jsonl, but not learned from\n"
    )
    assert "3 skipped" in said and said.endswith(command)


def test_three_in_a_row_stop_the_run_with_its_last_good_state(workshop, tmp_path, losses):
    losses.update(dict.fromkeys([3, 4, 5], lambda: math.inf))
    run = tmp_path / "run"
    with pytest.raises(
        UserError,
        match=r"the loss is inf at step 3 and at all steps up to 5; start a new run "
        r"with a smaller --lr.*--resume",
    ):
        train.main(arguments(workshop, run, VANILLA))
    before, after = (checkpoint.StateFile(run / f"state/step0000000{step}.pt") for step in (4, 5))
    assert after.scalars["progress"]["skipped"] == 3 and steps_of(run) == [1, 2]
    for name, tensor in after.tensors.items():
        if "logits" in name:
            assert torch.equal(tensor, before.tensors[name]) and tensor.isfinite().all()
    train.main(["--resume", str(run)])
    assert steps_of(run) == [1, 2, 6]
