"""Runs a recipe of docs/after.md, as it stands on the page, on a run's results.

    python reproduce/after.py fine-tune --run results/RUN --text demo/train.jsonl \
        demo/real/{brown,essays}.jsonl --out results/finetuned
    python reproduce/after.py quantise --run results/RUN --out results/int8

The recipe runs on a CPU in bfloat16 autocast, if there is no GPU. Fine-tuning reads paragraphs of
at least 400 characters, in random order.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils

utils.use_short_spins()

from files.atomic import refuse_existing
from files.documents import documents
from utils import UserError, run_script, script_parser

import torch

PAGE = ROOT / "docs/after.md"
RECIPES = {"fine-tune": "finetuned/model", "quantise": "int8"}  # name -> the folder it writes
SHORTEST = 400  # characters of a paragraph, about 100 tokens


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--run", required=True, help="run of sparsify.py with its checkpoint")
    parser.add_argument("--text", nargs="*", default=[], help="text to fine-tune on")
    parser.add_argument("--out", required=True, help="folder for the model, must be new")
    args = parser.parse_args(argv)
    if args.recipe == "fine-tune" and not args.text:
        parser.error("fine-tuning needs --text")
    return args


def recipe(name: str) -> str:
    """Return the first code of the page's section that begins with this name."""
    section = re.search(rf"^## {name}(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.M | re.I)
    return re.search(r"```python\n(.*?)```", section[1], re.DOTALL)[1]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.out, "give another --out or remove it").absolute()
    if not Path(args.run, "checkpoint").exists():
        raise UserError(f"{args.run} has no checkpoint/: give a finished run of sparsify.py")
    code = recipe(args.recipe)
    if not torch.cuda.is_available():
        code = code.replace("max_steps=300", "max_steps=300, use_cpu=True, bf16=True")
    texts = [text for path in args.text for text in documents(path)]
    paragraphs = [line for text in texts for line in text.split("\n") if len(line) >= SHORTEST]
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        work = Path(folder)
        (work / "results").mkdir()
        (work / "results/RUN").symlink_to(Path(args.run).absolute())
        (work / "maskpro").symlink_to(ROOT)
        rows = [json.dumps({"text": paragraph}) for paragraph in paragraphs]
        (work / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
        (work / "recipe.py").write_text(code, encoding="utf-8")
        done = subprocess.run([sys.executable, "recipe.py"], cwd=work, check=False)
        if done.returncode:
            sys.exit(done.returncode)  # the recipe has printed the reason
        (work / RECIPES[args.recipe]).rename(out)


if __name__ == "__main__":
    run_script(main)
