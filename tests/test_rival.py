"""reproduce/rival.py: a rival in the place of sparsify.py's learner, all else as in a run of
ours."""

import sys

import sparsify
from utils import UserError

import pytest
import torch
from launched import ROOT
from runs import column, raises, read_run

sys.path.insert(0, str(ROOT / "reproduce"))
import rival


def test_a_rival_needs_the_text_and_m0_of_ours(workshop, tmp_path, monkeypatch):
    def before_it(*_):
        rival.main(f"roi --like {tmp_path}/ours --lr 0.1 --out {tmp_path}/run".split())

    monkeypatch.setattr(sparsify.preparation, "wanda_mask", before_it)
    with pytest.raises(UserError, match="ours must have its text and m0"):
        sparsify.main(
            f"--model {workshop}/dense --dataset {workshop}/text.jsonl --seqlen 24 --steps 6 "
            "--device cpu "
            f"--out {tmp_path}/ours".split()
        )


@pytest.fixture(scope="module")
def ours(workshop, tmp_path_factory):
    """A run of ours with channels reordered, from some given text and more that the model
    generates."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "given.txt").write_text((workshop / "text.jsonl").read_text()[:400])
    sparsify.main(
        f"--model {workshop}/dense --dataset {folder}/given.txt --seqlen 24 --batchsize 4 --dtype "
        "float32 --device cpu --steps 6 --seed 5 --permute --checkpoint_every 3 --skip_checkpoint "
        f"--out {folder}/run".split()
    )
    return folder / "run"


@pytest.mark.parametrize("method", rival.RIVALS)
def test_a_rival_in_the_place_of_our_learner(ours, tmp_path, monkeypatch, method):
    """It learns from the text of ours; stopped after three steps it ends in the mask of the run
    that was not."""
    like = f"--like {ours} --lr 0.1 --out".split()
    rival.main([method, *like, f"{tmp_path}/whole"])
    move, calls = rival.Rival.move, iter(range(3))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sparsify, "load", raises(KeyboardInterrupt))
        rival.main([method, *like, f"{tmp_path}/run"])
    with pytest.raises(
        UserError,
        match=f"resume it with `python reproduce/rival.py {method} --resume {tmp_path}/run`",
    ):
        # before its first state nothing in it is a rival's
        sparsify.main(["--resume", f"{tmp_path}/run"])
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(rival.Rival, "move", lambda *given: (next(calls), move(*given))[1])
        rival.main([method, "--resume", f"{tmp_path}/run"])
    rival.main([method, "--resume", f"{tmp_path}/run"])
    whole, run = (read_run(tmp_path / name) for name in ("whole", "run"))
    assert (
        list(ours.glob("generated*"))
        and whole.record["fingerprints"] == read_run(ours).record["fingerprints"]
    )
    assert (
        column(whole, "loss") == column(run, "loss")
        and whole.record["summary"]["blocks_changed"] > 0
    )
    assert column(whole, "changed") == column(run, "changed") and column(whole, "changed")[-1] > 0
    assert all(torch.equal(mask, run.masks[name]) for name, mask in whole.masks.items())
