"""The same flags give the same bits as before: a record of small runs, made before the code was moved, and its check.

    python tests/test_same_bits.py --renew      # after a change that is meant to change bits; say why in the commit

Each run's record holds a hash of its logits or weights, the fingerprint of its mask, its losses and its exit code.
Whether a machine rounds as the one that made the record is told by a probe, which uses no code of this project, with
the versions of torch and transformers, whose layers it does not try in every way: where it does, the bits must be the
same; elsewhere the losses must agree to LOOSE.
"""
import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_suffix(".json")
LOOSE = 2e-3  # nats

# on a machine that rounds otherwise a block falls otherwise in some step, and from there on it is another run: so many
# losses are compared there
STEADY = {"gradients, sampled, checkpointing": 3, "gradients, float16 logits, scores": 8}
COMMON = ("--model {w}/llama --dataset {w}/text.jsonl --dtype float32 --device cpu --sqlen 24 --batchsize 4 "
          "--step eager --skip_checkpoint --save --logits 1 --lr 5 --num_evals 3 --mask {w}/2of4.safetensors ")
ONLINE = "--dataset_size 16 --max_step 9 --baseline online "
GRADIENTS = "--estimator straight_through --lr 0.5 --tokens 1500 --epoch 1 "
SOFT = "--forward soft --normalize_gradient block "
PRESET = "--preset fast --no-curvature --tokens 3000 --lr 0.8 "
TRAIN = {  # name -> (processes, flags)
    "maskpro, cached": (1, "--dataset_size 16 --max_step 9 --baseline_file {w}/baseline.npz"),
    "maskpro, authors' logits": (1, ONLINE + "--lr 50 --logits 10"),
    "maskpro, debiased, cosine": (1, ONLINE + "--debias_tracker --schedule cosine"),
    "vanilla, linear": (1, "--dataset_size 16 --max_step 9 --estimator vanilla --lr 0.1 --schedule linear"),
    "residual": (1, ONLINE + "--estimator residual"),
    "running, normalized": (1, "--tokens 1500 --max_step 9 --estimator running --normalize_advantage --lr 0.3"),
    "maskpro, normalized, held out": (1, ONLINE + "--normalize_advantage --lr 0.3 --val_fraction 0.25"),
    "pattern space": (1, ONLINE + "--space pattern"),
    "exact": (1, ONLINE + "--step exact"),
    "4 masks a step": (1, ONLINE + "--samples 4"),
    "4 masks a step, exact, float16 logits": (1, ONLINE + "--samples 4 --step exact --logits_dtype float16"),
    "float16 logits": (1, ONLINE + "--logits_dtype float16"),
    "bfloat16 logits, some layers": (1, ONLINE + "--logits_dtype bfloat16 --targets q_proj down_proj"),
    "1:4": (1, ONLINE + "--sparsity_type 1:4 --mask {w}/1of4.safetensors"),
    "4:8": (1, ONLINE + "--sparsity_type 4:8 --mask {w}/4of8.safetensors"),
    "8:16": (1, ONLINE + "--sparsity_type 8:16 --mask {w}/8of16.safetensors"),
    "init random": (1, ONLINE + "--init random --val_fraction 0.25"),
    "init scores": (1, ONLINE + "--init scores"),
    "init scores, pattern space": (1, ONLINE + "--init scores --space pattern"),
    "init swaps": (1, ONLINE + "--init swaps"),
    "gpt2": (1, ONLINE + "--model {w}/gpt2 --mask {w}/gpt2.safetensors"),
    "gpt2, gradients": (1, GRADIENTS + "--model {w}/gpt2 --mask {w}/gpt2.safetensors --init swaps"),
    "preset fast": (1, PRESET + "--val_fraction 0.1 --logits 4"),
    "preset fast, 4:8": (1, PRESET + "--sparsity_type 4:8 --mask {w}/4of8.safetensors"),
    "preset fast, 8:16": (1, PRESET + "--sparsity_type 8:16 --mask {w}/8of16.safetensors"),
    "gradients": (1, GRADIENTS + "--schedule linear --microbatch 2"),
    "gradients, sampled, checkpointing": (1, GRADIENTS + "--forward sample --gradient_checkpointing --distill 0.5"),
    "gradients, float16 logits, scores": (1, GRADIENTS + "--logits_dtype float16 --init scores"),
    "gradients, soft, by block": (1, GRADIENTS + SOFT + "--curvature --microbatch 2"),
    "gradients, pattern space": (1, GRADIENTS + "--space pattern"),
    "2 processes": (2, ONLINE),
    "2 processes, gradients, --shard, swaps": (2, GRADIENTS + "--shard --init swaps --val_fraction 0.1"),
    "2 processes, --shard, soft, by block": (2, GRADIENTS + SOFT + "--shard"),
}
CALIBRATION = "--nsamples 6 --seqlen 40 --dataset {w}/text.jsonl"
PRUNE = {
    "magnitude": "--prune_method magnitude",
    "wanda": "--prune_method wanda",
    "wanda, true sequential": "--prune_method wanda --true_sequential",
    "wanda, swaps": "--prune_method wanda --swaps 3",
    "wanda, swaps, true sequential, 4:8": "--prune_method wanda --swaps 3 --true_sequential --sparsity_type 4:8",
    "ria, 1:4": "--prune_method ria --sparsity_type 1:4",
    "sparsegpt": "--prune_method sparsegpt",
    "sparsegpt, true sequential, gpt2": "--prune_method sparsegpt --true_sequential --model {w}/gpt2",
}
EXIT_CODES = {  # name -> (script, flags)
    "no such mask": ("train.py", "--mask {w}/none.safetensors --baseline online --dataset_size 16 --max_step 1"),
    "no such model": ("train.py", "--model {w}/none --dataset_size 16"),
    "a flag that is none": ("train.py", "--no_such_flag"),
    "another N:M": ("train.py", "--sparsity_type 4:8 --dataset_size 16 --baseline online"),
    "no baseline": ("train.py", "--dataset_size 16"),
    "a stale baseline": ("train.py", "--dataset_size 8 --baseline_file {w}/baseline.npz"),
    "samples by gradients": ("train.py", "--samples 2 --estimator straight_through"),
    "everything held out": ("train.py", "--dataset_size 4 --val_fraction 0.9 --baseline online"),
    "M that does not divide": ("train.py", "--sparsity_type 5:13 --dataset_size 16 --baseline online"),
}


# ------------------------------------------------------------------------------------------------------------ the runs


def workshop(w: Path) -> None:
    """Models, a text, masks and a baseline, as the pipeline makes them."""
    tiny.make_llama(w / "llama")
    tiny.make_gpt2(w / "gpt2")
    tiny.write_corpus(w / "text.jsonl", 40)
    for name, kind, pattern in (("2of4", "llama", "2:4"), ("1of4", "llama", "1:4"), ("4of8", "llama", "4:8"),
                                ("8of16", "llama", "8:16"), ("gpt2", "gpt2", "2:4")):
        script("prune.py", f"--prune_method magnitude --model {w}/{kind} --dtype float32 --device cpu "
                           f"--sparsity_type {pattern} --save_model {w}/{name}-model")
        script("get_mask.py", f"--model {w}/{name}-model --sparsity_type {pattern} --save {w}/{name}.safetensors")
    script("inference_loss.py", f"--model {w}/llama --dataset {w}/text.jsonl --dtype float32 --device cpu --sqlen 24 "
                                f"--batchsize 4 --dataset_size 16 --mask {w}/2of4.safetensors --save {w}/baseline.npz")


def script(name: str, flags: str) -> int:
    """Run a script of the repository in this process, silently; its exit code."""
    module = __import__(name.removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            utils.run_script(lambda: module.main(flags.split()))
        except SystemExit as stop:
            return stop.code or 0
        except BaseException:
            print(said.getvalue(), file=sys.__stderr__)
            raise
    return 0


def hashed(tensors: dict) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def record_of(run: Path) -> dict:
    """What a run of train.py came to."""
    summary = json.loads((run / "run.json").read_text())["summary"]
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    layers = [json.loads(line) for line in (run / "layers.jsonl").read_text().splitlines()]
    return {"logits": hashed(load_file(run / "logits.safetensors")), "mask": summary["mask_fingerprint"],
            "losses": [round(line["loss"], 6) for line in losses],
            "heldout": [round(line["heldout"], 6) for line in losses if line.get("heldout") is not None],
            "metrics": hashed({name: torch.tensor([line[name] or 0.0 for line in losses], dtype=torch.float64)
                               for name in ("loss", "baseline", "advantage")}),
            "changed": round(sum(layers[-1]["changed"].values()), 6),
            "entropy": round(sum(layers[-1]["entropy"].values()), 4), "steps": summary["steps"],
            "blocks_changed": summary["blocks_changed"]}


def train(w: Path, out: Path, processes: int, flags: str) -> dict:
    flags = (COMMON + flags).format(w=w) + f" --out {out}"
    if processes == 1:
        assert script("train.py", flags) == 0, flags
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run([*launcher, ROOT / "train.py", *flags.split()], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    return record_of(out)


def killed_and_resumed(w: Path, out: Path, flags: str) -> dict:
    """The run, killed after some steps and taken up again by another process."""
    flags = (COMMON + flags).format(w=w) + f" --checkpoint_every 1 --out {out}"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags.split()], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (out / "mask.safetensors").exists():
        assert script("train.py", f"--resume {out}") == 0
    return record_of(out)


def prune(w: Path, out: Path, flags: str) -> dict:
    flags = f"--model {w}/llama --dtype float32 --device cpu --save_model {out} {CALIBRATION} {flags}".format(w=w)
    assert script("prune.py", flags) == 0
    return {"weights": hashed(load_file(out / "model.safetensors"))}


def probe(w: Path) -> dict:
    """Versions, the vector instructions, and a hash of what transformers and torch make of the tiny models."""
    found = {}
    for kind in ("llama", "gpt2"):
        model = transformers.AutoModelForCausalLM.from_pretrained(w / kind).eval()
        tokens = torch.arange(96).view(4, 24) % 200 + 5
        logits = model(input_ids=tokens).logits
        logits.float().log_softmax(-1)[..., 3].sum().backward()
        found |= {f"{kind} logits": logits.detach()}
        found |= {f"{kind} {name}": parameter.grad for name, parameter in model.named_parameters()
                  if parameter.grad is not None}
    square = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    inverse = torch.linalg.cholesky_ex(square @ square.T + 64 * torch.eye(64))[0]
    found |= {"cholesky": inverse, "exp": torch.linspace(-20, 3, 9999).exp(),
              "random": torch.empty(99, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))}
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "vectors": torch.backends.cpu.get_cpu_capability(), "rounding": hashed(found)}


# ----------------------------------------------------------------------------------------------------------- the check


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_bits")
    workshop(folder)
    return folder


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def same_rounding(w, record):
    return probe(w) == record["probe"]


def check(found: dict, before: dict, same_rounding: bool, compared: int | None = None) -> None:
    if same_rounding:
        assert found == before
    else:
        assert found.get("steps") == before.get("steps")
        assert found.get("losses", [])[:compared] == pytest.approx(before.get("losses", [])[:compared], abs=LOOSE)


@pytest.mark.parametrize("name", TRAIN)
def test_learning(w, tmp_path, record, same_rounding, name):
    compared = STEADY.get(name)
    check(train(w, tmp_path / "run", *TRAIN[name]), record["train"][name], same_rounding, compared)


@pytest.mark.parametrize("name", ["maskpro, debiased, cosine", "gradients, float16 logits, scores",
                                  "gradients, soft, by block"])
def test_learning_that_is_killed_and_resumed(w, tmp_path, record, same_rounding, name):
    found = killed_and_resumed(w, tmp_path / "run", TRAIN[name][1])
    check(found, record["train"][name], same_rounding, STEADY.get(name))


@pytest.mark.parametrize("name", PRUNE)
def test_pruning(w, tmp_path, record, same_rounding, name):
    found = prune(w, tmp_path / "out", PRUNE[name])
    if not same_rounding:
        pytest.skip("this machine rounds otherwise than the record's, and weights have no looser comparison")
    assert found == record["prune"][name]


@pytest.mark.parametrize("name", EXIT_CODES)
def test_refusing(w, tmp_path, record, name):
    which, flags = EXIT_CODES[name]
    assert script(which, (COMMON + flags).format(w=w) + f" --out {tmp_path}/run") == record["exit codes"][name]
    assert not (tmp_path / "run").exists()


def renew() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        w = Path(folder)
        workshop(w)
        found = {"probe": probe(w), "train": {}, "prune": {}, "exit codes": {}}
        for number, (name, plan) in enumerate(TRAIN.items()):
            print(name, flush=True)
            found["train"][name] = train(w, w / f"run{number}", *plan)
        for number, (name, flags) in enumerate(PRUNE.items()):
            found["prune"][name] = prune(w, w / f"pruned{number}", flags)
        for name, (which, flags) in EXIT_CODES.items():
            found["exit codes"][name] = script(which, (COMMON + flags).format(w=w) + f" --out {w}/refused")
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit("usage: python tests/test_same_bits.py --renew")
    sys.path.insert(0, str(ROOT))
    renew()
