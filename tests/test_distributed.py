"""train.py and sparsify.py in several processes, as torchrun starts them: the bits of one process,
and no run is lost.

What the processes tell one another is held against one process that does the same work alone.
"""

import inspect
import json
import os
import shutil
import signal
from pathlib import Path

import train
from files import mask_files
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import decoder_layers, find_layers
from models.loading import load_model
from models.sharding import check_version
from training.checkpoint import StateFile
from utils import UserError

import pytest
import tiny
import torch
import transformers
from faults import kill
from launched import ROOT, Launched
from masked import magnitude_masks
from masked import same as same_tensors
from runs import is_strict, read_run, steps_of
from safetensors.torch import load_file
from sharded_script import TOKENS
from torch import nn
from torch.distributed import fsdp

PAPER = "--baseline online --logits 1 --lr 5 --debias_tracker --dataset_size 16 --epoch 4 --save"
GRADIENTS = "--batchsize 2"
KINDS = {PAPER: "train.py", GRADIENTS: "sparsify.py"}
needs_fsdp = pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters,
    reason="FSDP takes no ignored_params before torch 2.8",
)


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """A model, a text and m0."""
    folder = tmp_path_factory.mktemp("distributed")
    kill.workshop(folder)
    tiny.write_corpus(folder / "text.jsonl", 16)
    return folder


def arguments(w: Path, out: Path, flags: str) -> list[str]:
    mask = "" if "--init random" in flags else f"--mask {w}/mask.safetensors"
    return (
        f"--model {w}/dense {mask} --dataset {w}/text.jsonl --dtype float32 --device cpu --seqlen "
        f"24 --out {out} {flags}"
    ).split()


def started(count: int, w: Path, command: list, timeout_s: float = 600) -> Launched:
    return Launched(
        count,
        [ROOT / command[0] if isinstance(command[0], str) else command[0], *command[1:]],
        w / "said.txt",
        timeout_s,
    )


def learn(count: int, w: Path, out: Path, flags: str) -> Path:
    script = next(script for kind, script in KINDS.items() if flags.startswith(kind))
    launched = started(count, w, [script, *arguments(w, out, flags)])
    assert launched.wait() == 0, launched.said
    return out


SCRIPT = """
import sys, pytest, torch
from masking import compiler
from models import processes
from utils import UserError
with processes.joined("cpu"):
    rank, size = processes.rank(), processes.world_size()
    assert size == int(sys.argv[1]) and processes.is_main() == (rank == 0)
    everyone = range(size)
    assert processes.all_gather([rank, 1 / 3]) == [[r, 1 / 3] for r in everyone]
    parts = [int(count) for count, in processes.all_gather([float(len(processes.split(range(9))))])]
    assert parts in ([4, 5], [2, 2, 2, 3])
    assert processes.broadcast_float(7.0 + rank) == 7.0
    mean = sum(r + 3 for r in everyone) / sum(r + 1 for r in everyone)
    assert processes.mean([1.0] * rank + [3.0]) == mean
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.arange(6, dtype=dtype).view(2, 3) * rank
        processes.all_reduce_mean_async(tensor)()
        mean = torch.arange(6, dtype=dtype).view(2, 3) * (sum(everyone) / size)
        assert torch.equal(tensor, mean), tensor
        processes.broadcast_(tensor := torch.full((3,), 1 + rank, dtype=dtype))
        assert tensor.tolist() == [1, 1, 1]
    order = open(sys.argv[2], "a", buffering=1)
    with processes.main_process_first():
        order.write(f"{rank}\\n")
    if rank == 1:
        compiler.eagerly.set()
    compiler.compiled = lambda function, eager: function  # compiles in the others
    compiler.agree("cpu")
    assert compiler.eagerly.is_set()
    processes.check_same("equal", "the letters")
    with pytest.raises(UserError, match="the letters of process 1 differ from those of process 0"):
        processes.check_same("odd" if rank == 1 else "even", "the letters")
"""


def test_what_processes_tell_one_another(tmp_path):
    count = 4
    (tmp_path / "script.py").write_text(SCRIPT)
    launched = started(count, tmp_path, [tmp_path / "script.py", count, tmp_path / "order"])
    assert launched.wait() == 0, launched.said
    order = (tmp_path / "order").read_text().splitlines()
    assert order[0] == "0" and sorted(order) == [str(rank) for rank in range(count)]


def test_minibatches_split_over_processes_are_larger_minibatches(w, tmp_path):
    """Two processes with 4 sequences each learn what one learns from 8, but for rounding."""
    train.main(arguments(w, tmp_path / "alone", f"{PAPER} --batchsize 8 --skip_checkpoint"))
    learn(2, w, tmp_path / "two", f"{PAPER} --batchsize 4 --skip_checkpoint")
    two = read_run(tmp_path / "two")  # an epoch is two steps of two minibatches each
    assert (
        two.record["summary"]["mean_loss_last_epoch"]
        == sum(line["loss"] for line in two.metrics[-2:]) / 2
    )
    alone, two = (load_file(tmp_path / name / "logits.safetensors") for name in ("alone", "two"))
    for name, planes in alone.items():
        difference = (planes - two[name]).abs()
        assert difference.max() < 1e-2 and difference.mean() < 1e-4, name
        # they moved far more than that
        assert (planes - planes.round().clamp(0, 1)).abs().max() > 0.1, name


def test_text_order_and_m0_are_made_once_for_all(w, tmp_path):
    """Also where a process comes late to them."""
    (tmp_path / "script.py").write_text(
        "import time, sparsify, utils\nfrom models import generation, processes\nfrom training "
        "import preparation\ntold = lambda make: lambda *given, **more: (print('made by', "
        "make.__name__), make(*given, **more))[1]\ngeneration.write_text = "
        "told(generation.write_text)\npreparation.search_and_reorder = "
        "told(preparation.search_and_reorder)\npreparation.one_shot_masks = "
        "told(preparation.one_shot_masks)\nlate = lambda made: lambda *given: "
        "(time.sleep(processes.rank()), made(*given))[1]\npreparation.mixed = "
        "late(preparation.mixed)\npreparation.reorder_channels = "
        "late(preparation.reorder_channels)\nutils.run_script(sparsify.main)\n"
    )
    command = (
        f"--model {w}/dense --dtype float32 --device cpu --seqlen 24 --batchsize 2 --steps 3 "
        f"--permute --out {tmp_path}/run"
    )
    launched = started(2, w, [tmp_path / "script.py", *command.split()])
    assert launched.wait() == 0, launched.said
    for stage, name in (
        ("text", "write_text"),
        ("order", "search_and_reorder"),
        ("m0", "one_shot_masks"),
    ):
        assert launched.said.count(f"[{stage}] ") == 2, launched.said  # it begins and ends
        assert launched.said.count(f"made by {name}") == 1, launched.said
    assert steps_of(tmp_path / "run") == [1, 2, 3] and (tmp_path / "run/checkpoint").exists()
    assert is_strict(mask_files.load(tmp_path / "run/mask.safetensors").masks)


# ------------------------------------------------------------------------------------------ stopped


@needs_fsdp
def test_a_killed_process_ends_the_run_and_any_number_goes_on(w, tmp_path):
    flags = (
        f"{PAPER} --batchsize 2 --max_step 16 --epoch 100 --checkpoint_every 1 --skip_checkpoint "
        "--shard"
    )
    run = tmp_path / "killed/run"
    launched = started(2, w, ["train.py", *arguments(w, run, flags)])
    launched.wait_until(lambda: len(steps_of(run)) > 3)
    os.kill(launched.pid_of(1), signal.SIGKILL)
    assert launched.wait() != 0
    # no traceback of ours
    assert 3 < len(steps_of(run)) < 16 and f'File "{ROOT}/train.py"' not in launched.said
    shutil.copytree(run, tmp_path / "others")
    again = started(2, w, ["train.py", "--resume", run])
    assert again.wait() == 0, again.said
    assert kill.contents(run) == kill.contents(learn(2, w, tmp_path / "whole/run", flags))
    train.main(["--resume", str(tmp_path / "others")])
    assert len(steps_of(tmp_path / "others")) == 16
    assert is_strict(mask_files.load(tmp_path / "others/mask.safetensors").masks)


def test_a_process_that_hangs_is_reported(w, tmp_path):
    flags = f"{PAPER} --batchsize 2 --max_step 100000 --epoch 100000 --checkpoint_every 1"
    launched = started(2, w, ["train.py", *arguments(w, tmp_path / "run", flags)], timeout_s=10)
    launched.wait_until(lambda: len(steps_of(tmp_path / "run")) > 3)
    hanging = launched.pid_of(1)
    os.kill(hanging, signal.SIGSTOP)
    launched.wait_until(
        lambda: "error: process 0 lost another process, which has ended, hangs" in launched.said
    )
    os.kill(hanging, signal.SIGKILL)
    assert launched.wait() != 0
    assert (
        f"resume with: torchrun --nproc_per_node 2 train.py --resume {tmp_path}/run"
        in launched.said
    )


def test_a_signal_ends_all_processes_after_the_same_step(w, tmp_path):
    flags = f"{GRADIENTS} --steps 30 --skip_checkpoint"
    run = tmp_path / "stopped/run"
    launched = started(2, w, ["sparsify.py", *arguments(w, run, flags)])
    launched.wait_until(lambda: len(steps_of(run)) > 3)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait() != 0
    assert f"stopped after step {len(steps_of(run))}; its state is saved" in launched.said
    resumed = started(2, w, ["sparsify.py", "--resume", run])
    assert resumed.wait() == 0, resumed.said
    assert kill.contents(run) == kill.contents(learn(2, w, tmp_path / "whole/run", flags))


def test_a_state_may_take_longer_to_write_than_a_process_to_answer(w, tmp_path):
    (tmp_path / "script.py").write_text(
        "import time, train, utils\nfrom training import checkpoint\nsave = checkpoint.save\n"
        "checkpoint.save = lambda path, *given: (time.sleep(12 * ('00001.' in path.name)), "
        "save(path, *given))\nutils.run_script(train.main)\n"
    )
    flags = f"{PAPER} --batchsize 2 --max_step 2 --checkpoint_every 1"
    launched = started(
        2, w, [tmp_path / "script.py", *arguments(w, tmp_path / "run", flags)], timeout_s=10
    )
    assert launched.wait() == 0, launched.said
    assert (tmp_path / "run/mask.safetensors").exists()


# ------------------------------------------------------------------------------------------ refused


def test_a_process_that_reads_other_files_is_named(w, tmp_path):
    """Each process takes a text of its own."""
    for rank in range(2):
        tiny.write_corpus(tmp_path / f"text{rank}.jsonl", 16, seed=rank)
    (tmp_path / "script.py").write_text(
        f"import os, sys, train, utils\ntext = '{tmp_path}/text' + os.environ['RANK'] + '.jsonl'\n"
        "utils.run_script(lambda: train.main([*sys.argv[1:], '--dataset', text]))\n"
    )
    launched = started(
        2, w, [tmp_path / "script.py", *arguments(w, tmp_path / "run", f"{PAPER} --batchsize 4")]
    )
    assert launched.wait() != 0
    assert (
        "model, mask, text, flags or versions of process 1 differ from those of process 0"
        in launched.said
    )


# ----------------------------------------------------------------------------------- sharded layers


@needs_fsdp
@pytest.mark.parametrize(
    "count, flags",
    [
        (3, f"{PAPER} --batchsize 2 --logits_dtype float16 --val_fraction 0.3 --init scores"),
        (2, f"{PAPER} --batchsize 2 --init random"),
        (2, f"{GRADIENTS} --steps 6 --gradient_checkpointing"),
    ],
)
def test_sharded_layers_learn_what_copies_learn(w, tmp_path, count, flags):
    """To the bit without gradients; with them but for the order in which squares are added up. The
    checkpoint, which one process gathers, is the model under its mask."""
    copies = learn(count, w, tmp_path / "copies", flags)
    sharded = learn(count, w, tmp_path / "sharded", f"{flags} --shard")
    same = 0 if flags.startswith(PAPER) else 1e-4
    for line, other in zip(
        *(map(json.loads, (run / "metrics.jsonl").open()) for run in (copies, sharded))
    ):
        assert (line["loss"], line.get("heldout")) == pytest.approx(
            (other["loss"], other.get("heldout")), abs=same
        )
    if not same:
        found, expected = (load_file(run / "logits.safetensors") for run in (sharded, copies))
        assert same_tensors(found, expected)
    found, expected = (mask_files.load(run / "mask.safetensors").masks for run in (sharded, copies))
    assert sum(int((mask != expected[name]).sum()) for name, mask in found.items()) <= (
        4 if same else 0
    )
    saved, dense = (
        load_model(f"{path}", "float32", "cpu")[0] for path in (sharded / "checkpoint", w / "dense")
    )
    apply_masks(find_layers(dense), found)
    assert same_tensors(saved.state_dict(), dense.state_dict())


COMPILED = """
import importlib, os, sys
os.environ.pop("TORCHDYNAMO_DISABLE", None)
from masking import compiler
from torch._dynamo.utils import counters
importlib.import_module(sys.argv[1].removesuffix(".py")).main(sys.argv[2:])
assert counters["stats"]["unique_graphs"] > 1
assert not (compiler.eagerly.is_set() or compiler.failures)
"""


@needs_fsdp
@pytest.mark.parametrize("flags", [f"{PAPER} --batchsize 2", f"{GRADIENTS} --steps 24"])
def test_compiled_kernels_learn_under_fsdp_what_eager_ones_do(compiler, w, tmp_path, flags):
    """Two processes, layers of one shape. Compiled arithmetic may round otherwise, which turns few
    masks."""
    flags = f"{flags} --shard --targets down_proj"
    eager = learn(2, w, tmp_path / "eager", flags)
    (tmp_path / "script.py").write_text(COMPILED)
    script = next(script for kind, script in KINDS.items() if flags.startswith(kind))
    launched = started(
        2, w, [tmp_path / "script.py", script, *arguments(w, tmp_path / "compiled", flags)]
    )
    assert launched.wait() == 0, launched.said
    expected, found, m0 = (
        mask_files.load(path).masks
        for path in (
            eager / "mask.safetensors",
            tmp_path / "compiled/mask.safetensors",
            w / "mask.safetensors",
        )
    )
    assert any((mask != m0[name]).any() for name, mask in found.items())
    assert sum(int((mask != expected[name]).sum()) for name, mask in found.items()) <= 8
    logs = [(run / "metrics.jsonl").open() for run in (eager, tmp_path / "compiled")]
    for line, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=2e-3)


@needs_fsdp
def test_sharded_models_are_whole_models(models, tmp_path):
    """See sharded_script.py; 3 processes have unequal parts. The state that they save, one
    reads."""
    w = Path(
        shutil.copytree(
            Path(models["llama"]).parent, tmp_path / "models", ignore=lambda *_: ["opt"]
        )
    )
    tiny.make_opt(w / "opt", embedding=tiny.HIDDEN // 2)
    tiny.save_model(
        shutil.copytree(w / "gpt2", w / "neox"),
        transformers.GPTNeoXConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
    )
    launched = Launched(3, [ROOT / "tests/sharded_script.py", w], tmp_path / "said.txt")
    assert launched.wait() == 0, launched.said
    one, again = (
        MaskedModel(
            model,
            magnitude_masks(find_layers(model)),
            LinearSpace(2, 4),
            1.0,
            torch.float16,
            backend="eager",
        )
        for model in (load_model(str(w / "llama"), "float32", "cpu")[0] for _ in range(2))
    )
    for _ in range(3):
        one.update(5 * one.loss(TOKENS))
    expected = one.state()[1]
    again.restore({"steps": 3}, StateFile(w / "state_llama.pt").read)
    assert same_tensors(expected, again.state()[1])


def test_decoder_layers_are_the_outermost_lists():
    experts = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(5)) for _ in range(3))
    model = nn.ModuleDict({"embedding": nn.Embedding(2, 2), "layers": experts})
    assert decoder_layers(model) == list(experts)


@needs_fsdp
def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, mesh: None)
    with pytest.raises(UserError, match=r"--shard needs torch 2.8 or newer and this is"):
        check_version()
