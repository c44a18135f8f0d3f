"""The same flags give the same bits as before: a record of six small runs, and its check.

    # after a change that is meant to change bits; say why in the commit
    python tests/test_same_bits.py --renew

A run's record holds hashes of its mask and metrics, its losses and its steps. Whether a machine
rounds as the one that made the record is told by a probe, which uses no code of this project, with
the versions of torch and transformers: where it does, the bits must be the same; elsewhere the
losses must agree to LOOSE.
"""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_suffix(".json")
LOOSE, STEADY = 2e-3, 10  # nats; steps before a block falls otherwise and makes it another run
MODEL = "--model {w}/llama --dtype float32 --device cpu --dataset {w}/text.jsonl "
COMMON = MODEL + "--seqlen 24 --batchsize 4 --skip_checkpoint --mask {w}/2of4.safetensors "
PAPER = "train.py", COMMON + "--dataset_size 16 --max_step 9 --logits 1 "
OURS = "sparsify.py", COMMON + "--distill 1 --steps 30 "
RUNS = {  # name -> (processes, script, flags)
    "maskpro, cached": (1, PAPER[0], PAPER[1] + "--lr 5 --baseline {w}/baseline.npz"),
    "debiased, float16 logits, held out": (
        1,
        PAPER[0],
        PAPER[1]
        + "--debias_tracker --baseline online --lr 5 --logits_dtype float16 --val_fraction 0.25",
    ),
    "sparsify": (1, *OURS),
    "sparsify, GPT-2": (1, OURS[0], OURS[1] + "--model {w}/gpt2 --mask {w}/gpt2.safetensors"),
    "sparsify, 2 processes, --shard": (2, OURS[0], OURS[1] + "--steps 15 --shard"),
    "wanda, swaps, 4:8": (
        1,
        "prune.py",
        MODEL + "--nsamples 6 --seqlen 40 --prune_method wanda --swaps 3 "
        "--true_sequential --sparsity_type 4:8",
    ),
}


def workshop(w: Path) -> None:
    """Models, a text, masks and a baseline, as the pipeline makes them."""
    tiny.make_llama(w / "llama")
    tiny.make_gpt2(w / "gpt2")
    tiny.write_corpus(w / "text.jsonl", 40)
    for name, kind in (("2of4", "llama"), ("gpt2", "gpt2")):
        script(
            "prune.py",
            f"--prune_method magnitude --model {w}/{kind} --dtype float32 --device cpu "
            f"--save_model {w}/{name}-model",
        )
        script("get_mask.py", f"--model {w}/{name}-model --save {w}/{name}.safetensors")
    script(
        "inference_loss.py",
        f"--model {w}/llama --dataset {w}/text.jsonl --dtype float32 --device cpu --seqlen 24 "
        f"--batchsize 4 --dataset_size 16 --mask {w}/2of4.safetensors --save {w}/baseline.npz",
    )


def script(name: str, flags: str) -> None:
    """Run a script of the repository in this process, silently."""
    module = __import__(name.removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main(flags.split())


def run(w: Path, out: Path, processes: int, name: str, flags: str) -> dict:
    """A run, and what is recorded of it."""
    flags = flags.format(w=w) + (f" --save_model {out}" if name == "prune.py" else f" --out {out}")
    if processes == 1:
        script(name, flags)
    else:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        subprocess.run(
            [*launcher, ROOT / name, *flags.split()],
            cwd=ROOT,
            capture_output=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if name == "prune.py":
        return {"weights": hashed(load_file(out / "model.safetensors"))}
    summary = json.loads((out / "run.json").read_text())["summary"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "mask": summary["mask_fingerprint"],
        "losses": [round(line["loss"], 6) for line in lines],
        "heldout": [round(line["heldout"], 6) for line in lines if line.get("heldout") is not None],
        "metrics": hashed(
            {
                name: torch.tensor([line[name] or 0.0 for line in lines], dtype=torch.float64)
                for name in ("loss", "baseline", "advantage")
            }
        ),
        "steps": summary["steps"],
        "blocks_changed": summary["blocks_changed"],
    }


def hashed(tensors: dict) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def probe(w: Path) -> dict:
    """Versions, the vector instructions, and a hash of what transformers and torch make of the tiny
    models."""
    found = {}
    for kind in ("llama", "gpt2"):
        model = transformers.AutoModelForCausalLM.from_pretrained(w / kind).eval()
        tokens = torch.arange(96).view(4, 24) % 200 + 5
        logits = model(input_ids=tokens).logits
        logits.float().log_softmax(-1)[..., 3].sum().backward()
        found |= {f"{kind} logits": logits.detach()}
        found |= {
            f"{kind} {name}": parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    square = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    found |= {
        "cholesky": torch.linalg.cholesky_ex(square @ square.T + 64 * torch.eye(64))[0],
        "exp": torch.linspace(-20, 3, 9999).exp(),
        "random": torch.empty(99, dtype=torch.float64).exponential_(
            generator=torch.Generator().manual_seed(1)
        ),
    }
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "rounding": hashed(found),
    }


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_bits")
    workshop(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_are_those_of_the_record(w, tmp_path, name):
    record = json.loads(RECORD.read_text())
    found, before = run(w, tmp_path / "out", *RUNS[name]), record["runs"][name]
    if probe(w) == record["probe"]:
        assert found == before
        return
    if "losses" in before:  # weights have no looser comparison
        assert found["steps"] == before["steps"]
        assert found["losses"][:STEADY] == pytest.approx(before["losses"][:STEADY], abs=LOOSE)
    pytest.skip("bits were not compared: this machine or torch rounds otherwise than the record's")


def renew() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        w = Path(folder)
        workshop(w)
        runs = {
            name: run(w, w / f"run{number}", *plan)
            for number, (name, plan) in enumerate(RUNS.items())
        }
        RECORD.write_text(json.dumps({"probe": probe(w), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit("usage: python tests/test_same_bits.py --renew")
    sys.path.insert(0, str(ROOT))
    renew()
