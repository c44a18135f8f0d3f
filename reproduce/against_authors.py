"""Compares this project with the authors' scripts on the same model, mask and text, and prints a
Markdown table of the differences.

    git clone https://github.com/woodenchild95/Maskpro authors
    # the commit of the record
    git -C authors checkout 51255269ae3a5a0518d20b1dd897549e065d47b5
    # writes the text, demo/train.jsonl
    make demo DEMO_FLAGS=--quick
    # the command of the record: 12 minutes on 2 cores
    python reproduce/against_authors.py --authors authors --seqlen 64

The authors' get_mask.py, inference_loss.py and train.py run unchanged from the clone, each in a
separate process. Only their imports are patched, since they need a GPU, a hub and an older
transformers: the loaded model and text, float32 on the CPU, one worker, AdamW (imported, never
used), and the seed. Our scripts run next to them. The rows compare:

    mask       the mask of the sparse model that prune.py makes (Wanda, 2:4): the same weights must
               be kept
    baseline   f(m0 * w, minibatch) of each minibatch: equal to 1e-6 nats
    score      the score of masks that the authors' train.py draws, computed from its update of the
               logits, (logits before - after) / (lr * A), with pge.score. A is computed from the
               recorded losses by pge.Estimator.
    loss       the loss of the sampled masks in each quarter of the run: the difference of the means
               over seeds, in units of the standard deviation over seeds. The limit is that of a
               t-test, 1% for these rows together. The quarters are not independent, and three seeds
               are too few to estimate the deviation: six are run.
    changed    the share of blocks in which the final mask differs from m0, compared in the same way

The score is judged only in blocks where no weight has more than 0.9 of the probability. Saturated
blocks have a separate row, which is not judged: the authors add 1e-8 to denominators, which biases
their score there; pge.score is exact.

Without --model, a byte-level Llama with 0.13 M weights is first trained on the text, for a minute
or two. Minibatches have 32 sequences: with fewer, the authors' scripts divide by zero; with more,
they pair losses with the wrong baselines. The exit code is 1 if a row differs that should not.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils

utils.use_short_spins()

from evaluation.comparison import markdown_table
from files.records import write_json
from models.machine import environment
from utils import UserError, positive_int, run_script, script_parser, sequence_length

import numpy as np
from authors_rows import CRITICAL_T, baseline_file, compare
from byte_model import make_model

BATCHSIZE = 32  # the only batch size that the authors' scripts support
RECORDED = 8  # steps of the authors' run whose logits and masks are kept
POINTS = 60  # points of each curve in the record
HEADING = ["what", "theirs", "ours", "difference", "wanted", "verdict"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--authors", required=True, help="clone of github.com/woodenchild95/Maskpro"
    )
    parser.add_argument(
        "--model", default=None, help="folder of a small causal LM (default: one is trained)"
    )
    parser.add_argument(
        "--dataset", default="demo/train.jsonl", help='text, one {"text": ...} per line'
    )
    parser.add_argument(
        "--dataset_size", type=positive_int, default=512, help="documents, a multiple of 32"
    )
    parser.add_argument("--seqlen", type=sequence_length, default=128, help="tokens per document")
    parser.add_argument(
        "--epoch", type=positive_int, default=63, help="passes over the minibatches"
    )
    parser.add_argument("--lr", type=float, default=10.0, help="learning rate eta")
    parser.add_argument("--logits", type=float, default=5.0, help="initial logits C")
    parser.add_argument("--seeds", type=int, choices=CRITICAL_T, default=6, help="runs per side")
    parser.add_argument(
        "--record", help="JSON file to write, such as reproduce/records/against_authors.json"
    )
    args = parser.parse_args(argv)
    if args.dataset_size % BATCHSIZE or args.dataset_size * args.epoch < 4 * BATCHSIZE:
        parser.error("--dataset_size must be a multiple of 32, and a run have at least 4 steps")
    for path, remedy in (
        (f"{args.authors}/train.py", "clone github.com/woodenchild95/Maskpro and give its folder"),
        (args.dataset, "run `make demo DEMO_FLAGS=--quick`, or give another --dataset"),
        (args.model and f"{args.model}/config.json", "give a model's folder, or no --model"),
    ):
        if path and not Path(path).is_file():
            raise UserError(f"{path} is missing; {remedy}")
    if authors_git(args.authors, "status", "--porcelain", "--untracked-files=no"):
        raise UserError(
            f"{args.authors} has changes, and the authors' scripts are to run as they are; git "
            "stash them"
        )
    return args


def authors_git(folder: str, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", folder, *command], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------
# both sides


def run(name: str, command: list, folder: Path) -> None:
    """Run a script in a folder and wait for it. Raises UserError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"{name} has failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
        )


def ours(folder: Path, *script: object) -> None:
    """Run one of our scripts."""
    run(script[0], [ROOT / script[0], *script[1:]], folder)


def theirs(
    args: argparse.Namespace,
    folder: Path,
    *script: object,
    seed: int = 0,
    recorded: Sequence[int] = (),
) -> None:
    """Run one of the authors' scripts. recorded: the steps whose logits and masks are kept."""
    for name in ("initial_mask", "learned_mask", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    told = {
        "authors": str(Path(args.authors).resolve()),
        "script": [*map(str, script)],
        "seed": seed,
        "model": str(Path(args.model).resolve()),
        "dataset": str(Path(args.dataset).resolve()),
        "recorded": [*recorded],
    }
    run(
        f"{script[0]} of the authors",
        [ROOT / "reproduce/authors_scripts.py", json.dumps(told)],
        folder,
    )


def run_both(args: argparse.Namespace, work: Path, recorded: Sequence[int]) -> tuple[Path, Path]:
    """Run all that is compared: masks, baselines, and one run per seed on each side. Return the
    folders of the authors' results and of ours."""
    where = ["--model", Path(args.model).resolve(), "--dtype", "float32", "--device", "cpu"]
    data = [
        "--dataset",
        Path(args.dataset).resolve(),
        "--dataset_size",
        args.dataset_size,
        "--batchsize",
        BATCHSIZE,
        "--seqlen",
        args.seqlen,
    ]
    sizes = ["--dataset_size", args.dataset_size, "--batchsize", BATCHSIZE, "--sqlen", args.seqlen]
    settings = ["--lr", args.lr, "--logits", args.logits, "--epoch", args.epoch]
    a = work / "theirs"
    b = work / "ours"
    b.mkdir()
    ours(
        b,
        "prune.py",
        *where,
        "--dataset",
        Path(args.dataset).resolve(),
        "--nsamples",
        32,
        "--seqlen",
        args.seqlen,
    )
    ours(b, "get_mask.py")
    ours(b, "inference_loss.py", *where, *data)
    shutil.copytree(b / "out", a / "out")
    theirs(args, a, "get_mask.py")
    theirs(args, a, "inference_loss.py", *sizes)
    for seed in range(args.seeds):
        print(
            f"seed {seed}: {args.epoch * args.dataset_size // BATCHSIZE} steps on each side",
            flush=True,
        )
        here = ["--seed", seed, "--skip_checkpoint", "--out", f"seed{seed}"]
        at = a / f"seed{seed}"
        shutil.copytree(a / "initial_mask", at / "initial_mask")
        shutil.copy(baseline_file(a), at)
        with ThreadPoolExecutor() as pool:
            sides = [
                pool.submit(ours, b, "train.py", *where, *data, *settings, *here),
                pool.submit(
                    theirs,
                    args,
                    at,
                    "train.py",
                    *sizes,
                    *settings,
                    "--save",
                    seed=seed,
                    recorded=recorded if seed == 0 else (),
                ),
            ]
        for side in sides:
            side.result()
    return a, b


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    here = environment("cpu")
    steps = args.epoch * args.dataset_size // BATCHSIZE
    starts = np.linspace(1, steps - 1, RECORDED).astype(int).tolist()
    with tempfile.TemporaryDirectory() as work:
        args.model = args.model or make_model(args.dataset, Path(work, "model"))
        weights = b"".join(
            path.read_bytes() for path in sorted(Path(args.model).glob("*.safetensors"))
        )
        folders = run_both(args, Path(work), [*starts, *(start + 1 for start in starts)])
        rows, curves, mask = compare(*folders, args.seeds, args.lr)
    print("\n" + markdown_table(HEADING, rows))
    windows = np.array_split(np.arange(steps), min(steps, POINTS))
    record = {
        "command": "python "
        + shlex.join([os.path.relpath(__file__), *(sys.argv[1:] if argv is None else argv)]),
        "authors": (
            f"github.com/woodenchild95/Maskpro at {authors_git(args.authors, 'rev-parse', 'HEAD')}"
        ),
        **here,
        "seeds": [*range(args.seeds)],
        "sha256": {
            "model": hashlib.sha256(weights).hexdigest(),
            "text": hashlib.sha256(Path(args.dataset).read_bytes()).hexdigest(),
            "mask (fingerprint)": mask,
        },
        "table": [dict(zip(HEADING, row)) for row in rows],
        "curves": {
            "last step": [int(window[-1]) + 1 for window in windows],
            **{
                side: [round(float(curve[:, window].mean()), 5) for window in windows]
                for side, curve in curves.items()
            },
        },
    }
    if args.record:
        write_json(args.record, record)
    if any(row[-1] == "DIFFERS" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
