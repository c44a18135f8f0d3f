"""Runs that are stopped, killed, starved of disk or of finite numbers, and what `train.py` makes of
them.

The short version of tests/faults/kill.py, and each refusal and promise by itself.
"""

import json
import os
import random
import signal
import subprocess
import sys

import train
from training import checkpoint, figures, initialize
from training.signals import StopSignals
from utils import UserError

import pytest
from faults import kill
from runs import ROOT, VANILLA, arguments, raises, states_of, steps_of


def stop(workshop, run, flags, losses, at):
    """A run that fails in this step."""
    losses[at] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(workshop, run, flags))


def assert_as_uninterrupted(workshop, run, flags):
    whole = run.parent / "whole/run"
    train.main(arguments(workshop, whole, flags))
    assert kill.contents(run) == kill.contents(whole)


# ------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("name", ["maskpro", "sparsify", "pattern space"])
def test_killed_runs_end_as_if_they_had_not_been(workshop, name):
    counts = kill.campaign(workshop, *kill.RUNS[name], 2, random.Random(len(name)))
    assert counts["kills"] >= 2 and counts["runs"] == counts["same"] >= 1


def test_a_random_start_goes_on_with_its_own_m0(workshop, tmp_path, losses):
    """Its m0 is in no file: it is drawn again, and baselines that no step has asked for yet are of
    it."""
    flags = "--init random --logits 3 --val_fraction 0.25"
    stop(workshop, tmp_path / "run", flags, losses, at=5)
    train.main(["--resume", str(tmp_path / "run")])
    assert_as_uninterrupted(workshop, tmp_path / "run", flags)


def test_a_run_keeps_its_precision_on_another_device(workshop, tmp_path, losses, monkeypatch):
    """--dtype auto is what it was where the run began."""
    stop(workshop, tmp_path / "run", f"{VANILLA} --dtype auto", losses, at=3)
    assert train.parse_args(["--resume", str(tmp_path / "run"), "--dtype", "auto"]).dtype != "auto"
    monkeypatch.setattr(
        "models.machine.fast_dtype", raises(AssertionError("another device was asked"))
    )
    train.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/mask.safetensors").exists()


def test_killed_inside_the_write_of_a_state(workshop, tmp_path):
    """The state being written is lost, the one before it is not."""
    code, said = kill.in_process(
        workshop, arguments(workshop, tmp_path / "run", VANILLA), "chunk", 150, signal.SIGKILL
    )
    states = list((tmp_path / "run/state").iterdir())
    assert code == -9, said
    assert (
        sum(path.name.startswith(".step") for path in states) == 1
        and sum(map(checkpoint.is_whole, states)) >= 1
    )
    train.main(["--resume", str(tmp_path / "run")])
    assert_as_uninterrupted(workshop, tmp_path / "run", VANILLA)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(workshop, tmp_path, sent):
    flags = arguments(workshop, tmp_path / "run", f"{VANILLA} --checkpoint_every 10m")
    code, said = kill.in_process(workshop, flags, "forward", 100, sent)
    assert code == 128 + sent
    assert (
        f"resume with: python train.py --resume {tmp_path}/run" in said and "Traceback" not in said
    )
    done = steps_of(tmp_path / "run")[-1]
    assert f"stopped after step {done}; its state is saved" in said
    assert states_of(tmp_path / "run") == [f"step{done:08d}.pt"]


def test_torn_states_are_passed_over(workshop, tmp_path, losses, capsys):
    stop(workshop, tmp_path / "run", VANILLA, losses, at=6)
    assert states_of(tmp_path / "run") == ["step00000004.pt", "step00000005.pt"]
    assert f"python train.py --resume {tmp_path}/run" in capsys.readouterr().err
    newest = tmp_path / "run/state/step00000005.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    train.main(["--resume", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "step00000005.pt is truncated or damaged" in said and "resuming after step 4" in said
    assert_as_uninterrupted(workshop, tmp_path / "run", VANILLA)


@pytest.mark.parametrize("every, measured", [("1", 0), ("100", 1)])
def test_scores_are_measured_again_where_no_state_has_the_logits(
    workshop, tmp_path, losses, monkeypatch, every, measured
):
    """--init scores goes through the dense model's layers; a state that is there has what came of
    it."""
    flags = f"{VANILLA} --init scores --save --checkpoint_every {every}"
    calls, input_norms = [], initialize.input_norms
    monkeypatch.setattr(
        initialize, "input_norms", lambda *given: (calls.append(1), input_norms(*given))[1]
    )
    stop(workshop, tmp_path / "run", flags, losses, at=4)
    assert len(calls) == 1 and bool(list((tmp_path / "run").glob("state/*"))) == (every == "1")
    train.main(["--resume", str(tmp_path / "run")])
    assert len(calls) == 1 + measured
    assert_as_uninterrupted(workshop, tmp_path / "run", flags)


def test_in_a_fresh_process_the_mask_is_the_same(workshop, tmp_path):
    """Another process, with another hash seed."""
    code, said = kill.in_process(workshop, arguments(workshop, tmp_path / "first/run", "--save"))
    assert code == 0, said
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments(workshop, tmp_path / "again/run", "--save")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    assert kill.contents(tmp_path / "first/run") == kill.contents(tmp_path / "again/run")


def test_results_that_were_cut_short_are_made_again(workshop, tmp_path, monkeypatch):
    """The curve is drawn when mask and model are there."""
    whole, run = tmp_path / "whole/run", tmp_path / "cut/run"
    train.main(arguments(workshop, whole))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(figures, "learning_curve", raises(MemoryError()))
        train.main(arguments(workshop, run))
    assert (run / "mask.safetensors").exists() and "summary" not in json.loads(
        (run / "run.json").read_text()
    )
    train.main(["--resume", str(run)])
    assert kill.contents(run) == kill.contents(whole)


def test_a_second_signal_ends_at_once_and_what_nohup_ignores_stays_ignored():
    with StopSignals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------ refused


def test_changed_settings_are_refused_by_name(stopped):
    with pytest.raises(
        UserError, match=r"--seed 0 there, 1 here; --lr 0.1 there, 0.2 here; leave them out"
    ):
        train.main(["--resume", str(stopped), "--lr", "0.2", "--seed", "1", "--max_step", "6"])
    record = json.loads((stopped / "run.json").read_text())
    for name in ("model", "mask", "text"):
        changed = {**record, "fingerprints": {**record["fingerprints"], name: "0" * 16}}
        (stopped / "run.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"made from another {name} \(0000000000000000 there"):
            train.main(["--resume", str(stopped)])


def test_a_finished_run_says_so(workshop, tmp_path, capsys):
    train.main(arguments(workshop, tmp_path / "run", "--max_step 1"))
    train.main(["--resume", str(tmp_path / "run")])
    assert "is finished" in capsys.readouterr().out
