"""Runs that are stopped, killed, starved of disk or of finite numbers, and what `train.py` makes of them.

The short version of tests/faults/kill.py, and each refusal and promise by itself.
"""
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from utils import UserError

import pytest
import torch
from faults import kill
from hypothesis import given, settings
from hypothesis import strategies as st

import pge
import train
from files import mask_files
from training import args as train_args
from training import checkpoint, initialize, run_folder, straight_through, validation

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """The workshop of tests/faults/kill.py."""
    folder = tmp_path_factory.mktemp("workshop")
    kill.workshop(folder)
    return folder


def arguments(w: Path, out: Path, flags: str = "") -> list[str]:
    return (f"--model {w}/dense --mask {w}/mask.safetensors --dataset {w}/text.jsonl --dtype float32 --device cpu "
            "--dataset_size 8 --batchsize 2 --sqlen 24 --step eager --logits 1 --lr 5 --baseline online --max_step 6 "
            f"--targets q_proj --skip_checkpoint --checkpoint_every 1 --out {out} {flags}").split()


@pytest.fixture
def losses(monkeypatch):
    """step -> what the loss of that step is instead (a function of no argument); counts the forward passes
    of steps, of which --estimator vanilla makes one each, and of held-out minibatches."""
    said, count = {}, [0]
    true = train.batch_loss

    def loss(*given):
        count[0] += 1
        return said[count[0]]() if count[0] in said else true(*given)
    for module in (train, validation):
        monkeypatch.setattr(module, "batch_loss", loss)
    return said


def raises(error):
    def function():
        raise error
    return function


VANILLA = "--estimator vanilla --lr 0.1"


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def states_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").iterdir())


# -------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("name", ["maskpro", "preset fast", "pattern space"])
def test_killed_runs_end_as_if_they_had_not_been(w, name):
    counts = kill.campaign(w, kill.RUNS[name], 2, random.Random(len(name)))
    assert counts["kills"] >= 2 and counts["runs"] == counts["same"] >= 1


@pytest.mark.parametrize("number", [20, 25, 30])
def test_killed_inside_the_write_of_a_state(w, tmp_path, number):
    """The state being written is lost, the one before it is not."""
    flags = arguments(w, tmp_path / "run", VANILLA)
    code, said = kill.in_process(w, flags, "chunk", number, signal.SIGKILL)
    states = list((tmp_path / "run/state").iterdir())
    assert code == -9, said
    assert sum(path.name.startswith(".step") for path in states) == 1 and sum(map(checkpoint.is_whole, states)) >= 1
    train.main(["--resume", str(tmp_path / "run")])
    train.main([*flags, "--out", str(tmp_path / "whole/run")])
    assert kill.contents(tmp_path / "run") == kill.contents(tmp_path / "whole/run")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(w, tmp_path, sent):
    code, said = kill.in_process(w, arguments(w, tmp_path / "run", f"{VANILLA} --checkpoint_every 10m"), "forward",
                                 100, sent)
    assert code == 128 + sent
    assert f"go on with: python train.py --resume {tmp_path}/run" in said and "Traceback" not in said
    done = steps_of(tmp_path / "run")[-1]
    assert f"stopped after step {done}, with its state saved" in said
    assert states_of(tmp_path / "run") == [f"step{done:08d}.safetensors"]


def test_trackers_go_on_at_the_step_after_the_state(w, tmp_path, losses, monkeypatch):
    told = []

    class Tracker:
        def __init__(self, folder, arguments, name, step):
            told.append(("start", name, step))

        def log(self, step, values):
            told.append(step)

        def flush(self):
            told.append("flush")

        def close(self):
            told.append("close")
    monkeypatch.setattr("training.tracking.chosen", lambda *_: [Tracker])
    losses[4] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(w, tmp_path / "run", f"{VANILLA} --checkpoint_every 2"))
    name = json.loads((tmp_path / "run/run.json").read_text())["id"]
    assert told == [("start", name, 0), 1, 2, "flush", 3, "close"]
    told.clear()
    train.main(["--resume", str(tmp_path / "run")])
    assert told == [("start", name, 2), 3, 4, "flush", 5, 6, "flush", "close"]


def test_torn_states_are_passed_over(w, tmp_path, losses, capsys):
    losses[6] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(w, tmp_path / "run", VANILLA))
    assert states_of(tmp_path / "run") == ["step00000004.safetensors", "step00000005.safetensors"]
    assert f"python train.py --resume {tmp_path}/run" in capsys.readouterr().err
    newest = tmp_path / "run/state/step00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train.main(["--resume", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "step00000005.safetensors is torn or damaged" in said and "going on after step 4" in said
    train.main(arguments(w, tmp_path / "whole/run", VANILLA))
    assert kill.contents(tmp_path / "run") == kill.contents(tmp_path / "whole/run")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_cut_and_no_flipped_bit_goes_unnoticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("state") / "step00000001.safetensors"
    tensors = {"b": torch.arange(5, dtype=torch.uint8), "a": torch.randn(2, 3), "h": torch.randn(3).half()}
    checkpoint.save(path, {"x": [0.1, None]}, tensors)
    assert checkpoint.is_whole(path)
    saved = checkpoint.StateFile(path)
    assert saved.scalars == {"x": [0.1, None]} and all(torch.equal(saved.read(k, v), v) for k, v in tensors.items())
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:place])
    assert not checkpoint.is_whole(path)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1:])
    assert not checkpoint.is_whole(path)


def test_a_state_of_another_shape_or_dtype_is_refused(tmp_path):
    checkpoint.save(tmp_path / "s", {}, {"a": torch.zeros(4)})
    saved = checkpoint.StateFile(tmp_path / "s")
    for name, like in [("a", torch.zeros(5)), ("a", torch.zeros(4).half()), ("b", torch.zeros(4))]:
        with pytest.raises(UserError, match="the state of another run"):
            saved.read(name, like)


@pytest.mark.parametrize("make", [pge.Vanilla, pge.Residual, lambda: pge.MaskPro(0.9, True), pge.Running,
                                  lambda: pge.Normalized(pge.Running()), lambda: pge.Normalized(pge.MaskPro())])
def test_estimators_go_on_from_their_state(make):
    whole, first, second = make(), make(), make()
    given = [(math.sin(t), math.cos(t), t % 3) for t in range(12)]
    expected = [whole.advantage(*step) for step in given]
    found = [first.advantage(*step) for step in given[:5]]
    second.restore(json.loads(json.dumps(first.state()[0])))
    assert found + [second.advantage(*step) for step in given[5:]] == expected


def test_when_a_state_is_due(tmp_path):
    by_steps, by_time = (checkpoint.Checkpoints(tmp_path, every, 2) for every in ("5", "0.5m"))
    assert [step for step in range(1, 21) if by_steps.due(step, 0.0)] == [5, 10, 15, 20]
    assert not by_time.due(9, 29) and by_time.due(9, 31) and not by_time.due(9, 29, last=True)
    by_time.step, by_time.saved_at, by_time.cost_s = 9, 31, 2.0
    assert not by_time.due(20, 31 + 99) and by_time.due(20, 31 + 101)  # two seconds are 2 % of a hundred
    by_time.cost_s = 0.1
    assert by_time.due(20, 31 + 6, last=True) and not by_time.due(20, 31 + 4, last=True)


@pytest.mark.parametrize("every", ["0", "0m", "-1", "5s", "m", "", "1.5", "nan"])
def test_intervals_that_are_none(every, capsys):
    with pytest.raises(SystemExit) as stop:
        train_args.parse(train.__doc__, ["--checkpoint_every", every])
    assert stop.value.code == 2 and "such as 10m" in capsys.readouterr().err


@pytest.mark.parametrize("every, measured", [("1", 0), ("100", 1)])
def test_scores_are_measured_again_where_no_state_has_the_logits(w, tmp_path, losses, monkeypatch, every, measured):
    """--init scores goes through the dense model's layers; a state that is there has what came of it."""
    flags = f"{VANILLA} --init scores --save --checkpoint_every {every}"
    calls, input_norms = [], initialize.input_norms
    monkeypatch.setattr(initialize, "input_norms", lambda *given: (calls.append(1), input_norms(*given))[1])
    losses[4] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(w, tmp_path / "run", flags))
    assert len(calls) == 1 and bool(list((tmp_path / "run").glob("state/*"))) == (every == "1")
    calls.clear()
    train.main(["--resume", str(tmp_path / "run")])
    assert len(calls) == measured
    train.main(arguments(w, tmp_path / "whole/run", flags))
    assert len(calls) == measured + 1 and kill.contents(tmp_path / "run") == kill.contents(tmp_path / "whole/run")



# ------------------------------------------------------------------------------------------------ refused and repeated


@pytest.fixture
def stopped(w, tmp_path, losses):
    """A run that stopped after three steps."""
    losses[4] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(w, tmp_path / "run", VANILLA))
    return tmp_path / "run"


def test_changed_settings_are_refused_by_name(stopped):
    with pytest.raises(UserError, match=r"--lr 0.1 there, 0.2 here; --seed 0 there, 1 here; leave them out"):
        train.main(["--resume", str(stopped), "--lr", "0.2", "--seed", "1", "--max_step", "6"])
    with pytest.raises(UserError, match="--out"):
        train.main(["--resume", str(stopped), "--out", "elsewhere"])
    record = json.loads((stopped / "run.json").read_text())
    record["arguments"]["lr"] = 0.3
    (stopped / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"--lr 0.1 there, 0.3 here"):
        train.main(["--resume", str(stopped)])


def test_how_long_a_run_waits_may_change(stopped):
    """What was too short to save the model must not be so for ever."""
    train.main(["--resume", str(stopped), "--timeout_s", "1200"])
    assert (stopped / "mask.safetensors").exists()


def test_other_texts_and_masks_are_refused_by_name(w, stopped):
    record = json.loads((stopped / "run.json").read_text())
    for name in ("model", "mask", "text"):
        changed = {**record, "fingerprints": {**record["fingerprints"], name: "0" * 16}}
        (stopped / "run.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"made from another {name} \(0000000000000000 there"):
            train.main(["--resume", str(stopped)])


@pytest.mark.parametrize("change, words", [
    (lambda record: "{", "it is damaged"), (lambda record: "[]", "it is damaged"),
    (lambda record: json.dumps({**record, "arguments": {"lr": {}}}), "argument --lr"),
    (lambda record: json.dumps({**record, "arguments": {"lrr": 1}}), "there is no --lrr"),
    (lambda record: json.dumps({**record, "arguments": {"alpha": 7}}), "--alpha 7"),
    (lambda record: json.dumps({**record, "arguments": {"trust_remote_code": True}}), "add the flag if you still")])
def test_records_that_are_none(stopped, change, words):
    (stopped / "run.json").write_text(change(json.loads((stopped / "run.json").read_text())))
    with pytest.raises(UserError, match=words):
        train.main(["--resume", str(stopped)])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for flag in ("--resume", "--repeat"):
        with pytest.raises(UserError, match=r"run.json cannot be read .*; give the folder of a run"):
            train.main([flag, str(tmp_path)])


def test_lost_lines_are_noticed(stopped):
    (stopped / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl is not as the run left it"):
        train.main(["--resume", str(stopped)])


def test_a_finished_run_says_so(w, tmp_path, capsys):
    train.main(arguments(w, tmp_path / "run", "--max_step 1"))
    train.main(["--resume", str(tmp_path / "run")])
    assert "is finished" in capsys.readouterr().out


def test_repeated_in_a_fresh_process_the_mask_is_the_same(w, tmp_path):
    """Another process, with another hash seed; and --deterministic runs."""
    code, said = kill.in_process(w, arguments(w, tmp_path / "run", "--deterministic --save"))
    assert code == 0, said
    done = subprocess.run([sys.executable, ROOT / "train.py", "--repeat", tmp_path / "run"], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    first, again = kill.contents(tmp_path / "run"), kill.contents(tmp_path / "run_repeat")
    curve = Path("curve.png")  # names the run
    assert first.pop(curve) and again.pop(curve) and first == again
    there, here = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "run_repeat"))
    assert there["environment"] == here["environment"] and there["fingerprints"] == here["fingerprints"]


# --------------------------------------------------------------------------------------------------------- two at once


def test_the_second_run_in_a_folder_is_refused(stopped, capsys):
    words = rf"another run \(process {os.getpid()} on .*\); wait for its end"
    with run_folder.lock(stopped), pytest.raises(UserError, match=words):
        train.main(["--resume", str(stopped)])
    assert (stopped / "state").exists()
    with open(stopped / "lock", "a") as file:  # of a process that is no more
        file.write("process 1 on another machine")
    train.main(["--resume", str(stopped)])


def test_a_stopped_runs_folder_says_how_to_go_on(w, stopped):
    with pytest.raises(UserError, match=r"exists already; go on with it: python train.py --resume .*or choose another"):
        train.main(arguments(w, stopped))


def test_a_run_that_fails_before_its_first_step_leaves_nothing(w, tmp_path, losses):
    losses[1] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(w, tmp_path / "a/b/run", VANILLA))
    assert not (tmp_path / "a").exists()


# -------------------------------------------------------------------------------------------------- not finite numbers


def test_a_loss_that_is_not_finite_is_skipped_and_counted(w, tmp_path, losses, capsys):
    losses[2] = losses[3] = losses[5] = lambda: math.nan
    train.main(arguments(w, tmp_path / "run", VANILLA))
    assert steps_of(tmp_path / "run") == [1, 4, 6]
    assert json.loads((tmp_path / "run/run.json").read_text())["summary"]["steps_skipped"] == 3
    assert "3 skipped" in capsys.readouterr().out


def test_three_in_a_row_stop_the_run_with_its_last_good_state(w, tmp_path, losses):
    losses.update(dict.fromkeys([3, 4, 5], lambda: math.inf))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"the loss is inf at step 3 and at all up to step 5; lower --lr.*--resume"):
        train.main(arguments(w, run, VANILLA))
    before, after = (checkpoint.StateFile(run / f"state/step0000000{step}.safetensors") for step in (4, 5))
    assert after.scalars["position"]["skipped"] == 3 and steps_of(run) == [1, 2]
    for name in after.names:
        if "logits" in name:
            assert torch.equal(after.file.get_tensor(name), before.file.get_tensor(name))
            assert after.file.get_tensor(name).isfinite().all()
    train.main(["--resume", str(run)])
    assert steps_of(run) == [1, 2, 6]


def test_a_straight_through_step_that_is_not_finite_moves_nothing(w, tmp_path, monkeypatch):
    seen = []

    def learn(learner, *given):
        seen.append({name: tensor.clone() for name, tensor in learner.masked.state()[1].items()})
        if len(seen) in (3, 4):
            monkeypatch.setattr("training.straight_through.summed_loss", lambda logits, *_: (math.nan, logits))
        else:
            monkeypatch.setattr("training.straight_through.summed_loss", true)
        return original(learner, *given)
    original, true = straight_through.StraightThrough.learn, straight_through.summed_loss
    monkeypatch.setattr(straight_through.StraightThrough, "learn", learn)
    train.main(arguments(w, tmp_path / "run", "--estimator straight_through --lr 1"))
    assert steps_of(tmp_path / "run") == [1, 2, 5, 6]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(seen)]
    assert same == [True, False, True, True, False]  # the first step only measures


# ---------------------------------------------------------------------------------------------------------- divergence


def lines(losses, heldout=()):
    return [{"step": t + 1, "loss": loss, **({"heldout": heldout[t]} if t < len(heldout) else {})}
            for t, loss in enumerate(losses)]


def test_divergence_is_above_the_start_for_long():
    noise = random.Random(0)
    flat = [3 + noise.gauss(0, 0.1) for _ in range(128)]
    rising = [loss + t / 300 for t, loss in enumerate(flat)]
    assert validation.diverging(lines(flat), 4, math.inf) is None
    assert validation.diverging(lines(flat[:96] + [9.0] * 32), 4, math.inf) is None  # not for long
    assert validation.diverging(lines(rising[:127]), 4, math.inf) is None  # the fourth window is not full
    assert "the training loss is" in validation.diverging(lines(rising), 4, math.inf)
    assert validation.diverging(lines(flat, [3.1, 3.2]), 4, 3.0) is None
    assert validation.diverging(lines(flat, [3.1, 3.2, 2.9]), 4, 3.0) is None
    assert "above the 3.0000 of m0" in validation.diverging(lines(flat, [2.9, 3.1, 3.2, 3.1]), 4, 3.0)


def test_divergence_is_announced_once_and_the_best_mask_delivered(w, tmp_path, losses, capsys):
    heldout = dict(zip([1, 3, 5, 7, 9, 11, 13], [3.0, 2.0, 3.1, 3.2, 3.3, 3.4, 3.5]))  # m0, then after each step
    losses.update({count: lambda value=value: value for count, value in heldout.items()})
    train.main(arguments(w, tmp_path / "run", f"{VANILLA} --val_fraction 0.2 --save --lr 3"))
    said, summary = capsys.readouterr(), json.loads((tmp_path / "run/run.json").read_text())["summary"]
    assert said.err.count("diverges") == 1 and "the mask of step 1 will be delivered" in said.err
    assert summary["diverged_at_step"] == 4 and summary["mask_of_step"] == 1 and summary["heldout_loss"] == 2.0
    losses.update({14: lambda: 3.0, 16: lambda: 2.0})  # m0 and after the first step again
    train.main(arguments(w, tmp_path / "one", f"{VANILLA} --val_fraction 0.2 --lr 3 --max_step 1"))
    one, delivered = (mask_files.load(tmp_path / name / "mask.safetensors").masks for name in ("one", "run"))
    assert all(torch.equal(one[name], mask) for name, mask in delivered.items())


# ---------------------------------------------------------------------------------------------------------------- disk


def test_too_little_disk_is_said_before_the_first_step(w, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"run needs 0.[0-9]+ MiB, but its disk has 0.1 MiB"):
        train.main(arguments(w, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["state", "metrics"])
def test_a_disk_that_fills_up_costs_no_more_than_the_time_since_the_last_state(w, tmp_path, monkeypatch, place):
    full = OSError(errno.ENOSPC, "No space left on device")
    save, log = checkpoint.save, run_folder.RunFolder.log

    def failing_save(path, scalars, tensors):
        if "step00000003" in path.name:
            raise UserError(f"{path} cannot be written ({full}); free some space") from full
        save(path, scalars, tensors)

    def failing_log(folder, line, layers=None):
        if line["step"] == 3:
            raise full
        log(folder, line, layers)
    with monkeypatch.context() as patch:
        if place == "state":
            patch.setattr(checkpoint, "save", failing_save)
        else:
            patch.setattr(run_folder.RunFolder, "log", failing_log)
        with pytest.raises(UserError, match=r"cannot be written.*No space left.*go on with: python train.py --resume"):
            train.main(arguments(w, tmp_path / "run"))
    assert states_of(tmp_path / "run") == ["step00000001.safetensors", "step00000002.safetensors"]
    train.main(["--resume", str(tmp_path / "run")])
    train.main(arguments(w, tmp_path / "whole/run"))
    assert kill.contents(tmp_path / "run") == kill.contents(tmp_path / "whole/run")
