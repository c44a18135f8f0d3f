"""train.py in several processes, as torchrun starts them: the bits of one process, and no run is lost.

What the processes tell one another is held against one process that does the same work alone.
"""
import json
import os
import shutil
import signal
from pathlib import Path

from utils import UserError

import pytest
import tiny
import torch
import transformers
from faults import kill
from launched import ROOT, Launched
from safetensors.torch import load_file

import train
from files import mask_files
from masking.layers import apply_masks
from models.layers import find_layers
from models.processes import ProcessGroup

FORWARD_ONLY = "--baseline online --logits 1 --lr 5 --debias_tracker --dataset_size 16 --epoch 4"
GRADIENTS = "--estimator straight_through --logits 1 --lr 3 --dataset_size 16 --epoch 3 --distill 0.5"


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """A model, a text and m0."""
    folder = tmp_path_factory.mktemp("distributed")
    kill.workshop(folder)
    tiny.write_corpus(folder / "text.jsonl", 16)
    return folder


def arguments(w: Path, out: Path, flags: str) -> list[str]:
    return (f"--model {w}/dense --mask {w}/mask.safetensors --dataset {w}/text.jsonl --dtype float32 --device cpu "
            f"--sqlen 24 --step eager --skip_checkpoint --save --num_evals 3 --out {out} {flags}").split()


def learn(processes: int, w: Path, out: Path, flags: str, without: str = "") -> Path:
    given = [flag for flag in arguments(w, out, flags) if flag != without]
    launched = Launched(processes, [ROOT / "train.py", *given], w / "said.txt")
    assert launched.wait() == 0, launched.said
    return out


def steps_of(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def killed(w: Path, run: Path, flags: str) -> Launched:
    """A run of two processes, the second of which was killed at work."""
    launched = Launched(2, [ROOT / "train.py", *arguments(w, run, flags)], w / "said.txt")
    launched.wait_until(lambda: steps_of(run) > 3)
    os.kill(launched.pid_of(1), signal.SIGKILL)
    assert launched.wait() != 0
    return launched


SCRIPT = """
import sys, torch
from models.processes import ProcessGroup
from utils import UserError
group = ProcessGroup("cpu", 30)
assert group.size == int(sys.argv[1])
everyone = range(group.size)
assert group.all_gather([group.rank, 1 / 3]) == [[r, 1 / 3] for r in everyone]
assert [item for row in group.all_gather([float(len(group.split(range(9))))]) for item in row] in ([4, 5], [2, 2, 2, 3])
assert group.split("abcdefghi")[0] == "abcdefghi"[9 * group.rank // group.size]
assert group.mean([1.0] * group.rank + [3.0]) == sum(r + 3 for r in everyone) / sum(r + 1 for r in everyone)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tensor = torch.arange(6, dtype=dtype).view(2, 3) * group.rank
    group.reduce_async(tensor)()
    assert torch.equal(tensor, torch.arange(6, dtype=dtype).view(2, 3) * (sum(everyone) / group.size)), tensor
order = open(sys.argv[2], "a", buffering=1)
with group.main_before_others():
    order.write(f"{group.rank}\\n")
group.check_same("equal", "the letters")
try:
    group.check_same("odd" if group.rank == 1 else "even", "the letters")
except UserError as error:
    assert str(error).startswith("the letters of process 1 differ from those of process 0"), error
else:
    raise AssertionError
try:
    with group.reported():
        raise RuntimeError("a mistake of ours")
except RuntimeError as error:
    assert not isinstance(error, UserError)
group.__exit__(None, None, None)
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_what_processes_tell_one_another(tmp_path, processes):
    (tmp_path / "script.py").write_text(SCRIPT)
    launched = Launched(processes, [tmp_path / "script.py", processes, tmp_path / "order"], tmp_path / "said.txt")
    assert launched.wait() == 0, launched.said
    order = (tmp_path / "order").read_text().splitlines()
    assert order[0] == "0" and sorted(order[:processes]) == [str(rank) for rank in range(processes)]


PATIENCE = """
import time
from models.processes import ProcessGroup
with ProcessGroup("cpu", timeout_s=2.0) as group:
    with group.main_before_others():
        time.sleep(4 if group.is_main else 0)  # a large model is fetched: longer than a process may take to answer
    assert group.all_gather([float(group.rank), None]) == [[0.0, None], [1.0, None]]
"""


def test_the_main_process_may_take_longer_than_an_answer(tmp_path):
    (tmp_path / "script.py").write_text(PATIENCE)
    launched = Launched(2, [tmp_path / "script.py"], tmp_path / "said.txt")
    assert launched.wait() == 0, launched.said


def test_alone_nothing_is_sent():
    group = ProcessGroup()
    tensor = torch.ones(3)
    group.reduce_async(tensor)()
    assert group.all_gather([1.0, 2.0]) == [[1.0, 2.0]] and group.mean([1.0, 2.0]) == 1.5
    assert group.split([1, 2]) == [1, 2]
    assert group.is_main and torch.equal(tensor, torch.ones(3)) and group.sent_bytes == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_masks_split_over_processes_are_the_masks_of_one(w, tmp_path, dtype):
    """K masks a step give the same bits whoever scores them, resumed by another number of processes included."""
    flags = f"{FORWARD_ONLY} --batchsize 4 --samples 4 --logits_dtype {dtype} --val_fraction 0.25"
    train.main(arguments(w, tmp_path / "alone/run", flags))
    expected = kill.contents(tmp_path / "alone/run")
    processes = 4 if dtype == "float32" else 2
    assert kill.contents(learn(processes, w, tmp_path / "several/run", flags)) == expected
    moved = load_file(tmp_path / "alone/run/logits.safetensors").values()
    assert any(not torch.equal(planes, planes.round()) for planes in moved)  # they started at 0 and 1


@pytest.mark.parametrize("flags", [FORWARD_ONLY, f"{GRADIENTS} --gradient_checkpointing"])
def test_minibatches_split_over_processes_are_larger_minibatches(w, tmp_path, flags):
    """Two processes with 4 sequences each learn what one learns from 8, but for rounding."""
    train.main(arguments(w, tmp_path / "alone", f"{flags} --batchsize 8"))
    learn(2, w, tmp_path / "two", f"{flags} --batchsize 4")
    alone, two = (load_file(tmp_path / name / "logits.safetensors") for name in ("alone", "two"))
    for name, planes in alone.items():
        difference = (planes - two[name]).abs()
        assert difference.max() < 1e-2 and difference.mean() < 1e-4, name
        start = planes.round().clamp(0, 1)
        assert (planes - start).abs().max() > 0.1, name  # far more than that


def test_a_killed_process_ends_the_run_and_another_number_goes_on(w, tmp_path):
    flags = f"{FORWARD_ONLY} --batchsize 2 --samples 2 --max_step 60 --epoch 100 --checkpoint_every 1"
    run = tmp_path / "killed/run"
    launched = killed(w, run, flags)
    assert steps_of(run) < 60 and f'File "{ROOT}/train.py"' not in launched.said, launched.said  # no traceback of ours
    train.main(["--resume", str(run)])
    train.main(arguments(w, tmp_path / "whole/run", flags))
    assert kill.contents(run) == kill.contents(tmp_path / "whole/run")


def test_a_process_that_hangs_is_reported(w, tmp_path):
    flags = f"{FORWARD_ONLY} --batchsize 2 --max_step 100000 --epoch 100000 --checkpoint_every 1 --timeout_s 4"
    launched = Launched(2, [ROOT / "train.py", *arguments(w, tmp_path / "run", flags)], tmp_path / "said.txt")
    launched.wait_until(lambda: steps_of(tmp_path / "run") > 3)
    hanging = launched.pid_of(1)
    os.kill(hanging, signal.SIGSTOP)
    launched.wait_until(lambda: "error: process 0 has lost another, which has ended or hangs" in launched.said)
    os.kill(hanging, signal.SIGKILL)
    assert launched.wait() != 0
    assert f"go on with: python train.py --resume {tmp_path}/run" in launched.said


def test_a_signal_ends_all_processes_after_the_same_step(w, tmp_path):
    flags = f"{GRADIENTS} --batchsize 2 --max_step 40 --epoch 100 --checkpoint_every 10m"
    run = tmp_path / "stopped/run"
    launched = Launched(2, [ROOT / "train.py", *arguments(w, run, flags)], tmp_path / "said.txt")
    launched.wait_until(lambda: steps_of(run) > 3)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait() != 0
    assert f"stopped after step {steps_of(run)}, with its state saved" in launched.said
    resumed = Launched(2, [ROOT / "train.py", "--resume", run], tmp_path / "said.txt")
    assert resumed.wait() == 0, resumed.said
    learn(2, w, tmp_path / "whole/run", flags)
    assert kill.contents(run) == kill.contents(tmp_path / "whole/run")


def test_a_state_may_take_longer_to_write_than_a_process_to_answer(w, tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys, time\nsys.path.append(os.getcwd())\nimport train, utils\n"
        "from training import checkpoint\nsave = checkpoint.save\n"
        "checkpoint.save = lambda path, *given: (time.sleep(9 * ('00001.' in path.name)), save(path, *given))\n"
        "utils.run_script(train.main)\n")
    flags = f"{FORWARD_ONLY} --batchsize 2 --max_step 2 --checkpoint_every 1 --timeout_s 6"
    launched = Launched(2, [tmp_path / "script.py", *arguments(w, tmp_path / "run", flags)], tmp_path / "said.txt")
    assert launched.wait() == 0, launched.said
    assert (tmp_path / "run/mask.safetensors").exists()


def test_masks_that_cannot_be_split_are_refused(w, tmp_path):
    launched = Launched(2, [ROOT / "train.py", *arguments(w, tmp_path / "run", f"{FORWARD_ONLY} --samples 3")],
                        tmp_path / "said.txt")
    assert launched.wait() != 0
    assert "error: --samples 3 cannot be split over 2 processes: choose a multiple" in launched.said
    assert not (tmp_path / "run").exists()


def test_a_process_that_reads_other_files_is_named(w, tmp_path):
    """Each process takes a text of its own."""
    (tmp_path / "script.py").write_text(
        "import os, sys\nsys.path.append(sys.argv.pop(1))\nimport train, utils\nimport tiny\n"
        "text = sys.argv.pop(1) + os.environ['RANK'] + '.jsonl'\n"
        "tiny.write_corpus(text, 16, seed=int(os.environ['RANK']))\n"
        "utils.run_script(lambda: train.main([*sys.argv[1:], '--dataset', text]))\n")
    command = [tmp_path / "script.py", ROOT / "tests", tmp_path / "text",
               *arguments(w, tmp_path / "run", f"{FORWARD_ONLY} --batchsize 4")]
    launched = Launched(2, command, tmp_path / "said.txt")
    assert launched.wait() != 0
    assert "model, mask, text, flags or versions of process 1 differ from those of process 0" in launched.said


def test_samples_are_for_forward_only_estimators(w, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(w, tmp_path / "run", f"{GRADIENTS} --samples 2"))
    assert "--samples is for the forward-only estimators" in capsys.readouterr().err


def test_logits_that_differ_stop_the_run():
    with pytest.raises(UserError, match="the logits of process 1"):
        group = ProcessGroup()
        group.all_gather = lambda values: [values, [values[0] + 1]]
        group.check_same("1 2 3", "the logits")


# ------------------------------------------------------------------------------------------------------ sharded layers


@pytest.mark.parametrize("processes, flags", [
    (3, f"{FORWARD_ONLY} --logits_dtype float16 --val_fraction 0.3"),
    (2, f"{GRADIENTS} --gradient_checkpointing --val_fraction 0.2"),
    (2, f"{GRADIENTS} --forward soft --normalize_gradient block --curvature")])
def test_sharded_layers_learn_what_copies_learn(w, tmp_path, processes, flags):
    """To the bit without gradients; with them but for the order in which squares are added up. The checkpoint, which
    one process gathers, is the model under its mask."""
    copies = learn(processes, w, tmp_path / "copies", f"{flags} --batchsize 2")
    sharded = learn(processes, w, tmp_path / "sharded", f"{flags} --batchsize 2 --shard", "--skip_checkpoint")
    same = 0 if flags.startswith(FORWARD_ONLY) else 1e-4
    for line, other in zip(*(map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                             for run in (copies, sharded))):
        assert (line["loss"], line.get("heldout")) == pytest.approx((other["loss"], other.get("heldout")), abs=same)
    found, expected = (load_file(run / "logits.safetensors") for run in (sharded, copies))
    assert found.keys() == expected.keys()
    assert all((planes - expected[name]).abs().max() <= 10 * same for name, planes in found.items())
    found, expected = (mask_files.load(run / "mask.safetensors").masks for run in (sharded, copies))
    assert sum(int((mask != expected[name]).sum()) for name, mask in found.items()) <= (4 if same else 0)
    saved, dense = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (sharded / "checkpoint",
                                                                                         w / "dense"))
    apply_masks(find_layers(dense), found)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_a_run_of_sharded_layers_goes_on_with_any_number_of_processes(w, tmp_path):
    flags = f"{FORWARD_ONLY} --batchsize 2 --max_step 16 --epoch 100 --checkpoint_every 1 --shard"
    run = tmp_path / "killed/run"
    killed(w, run, flags)
    done = steps_of(run)
    assert 3 < done < 16
    shutil.copytree(run, tmp_path / "others")
    again = Launched(2, [ROOT / "train.py", "--resume", str(run)], tmp_path / "again.txt")
    assert again.wait() == 0, again.said
    assert kill.contents(run) == kill.contents(learn(2, w, tmp_path / "whole/run", flags))
    three = Launched(3, [ROOT / "train.py", "--resume", tmp_path / "others"], tmp_path / "again.txt")
    three.wait_until(lambda: steps_of(tmp_path / "others") > done)
    three.send_signal(signal.SIGTERM)
    assert three.wait() != 0
    train.main(["--resume", str(tmp_path / "others")])
    assert steps_of(tmp_path / "others") == 16
    masks = mask_files.load(tmp_path / "others/mask.safetensors").masks
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())


def test_what_sharded_layers_cannot_do_is_refused(w, tmp_path):
    for flag in ("--samples 2", "--init scores"):
        with pytest.raises(UserError, match="leave out --samples, and --init scores"):
            train.main(arguments(w, tmp_path / "run", f"{FORWARD_ONLY} --shard {flag}"))
    flags = f"{GRADIENTS} --shard --batchsize 2 --dtype float16"
    launched = Launched(2, [ROOT / "train.py", *arguments(w, tmp_path / "run", flags)], tmp_path / "said.txt")
    assert launched.wait() != 0
    assert "error: float16 overflows" in launched.said and "use --dtype bfloat16 with --shard" in launched.said
    assert not (tmp_path / "run").exists()
