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
import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils

utils.use_short_spins()

from evaluation.comparison import markdown_table
from files import mask_files
from files.documents import documents
from files.records import read_lines, write_json
from models.machine import environment
from pge import Estimator, score
from utils import UserError, positive_int, progress_bar, run_script, script_parser, sequence_length

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BATCHSIZE = 32  # the only batch size that the authors' scripts support
STEPS = 400  # training steps of the model, if none is given
RECORDED = 8  # steps of the authors' run whose logits and masks are kept
SATURATED = 0.9  # probability of one weight above which its block counts as saturated
# runs per side -> limit of |t|, two-sided, 1% for 5 rows together
CRITICAL_T = {2: 22.33, 3: 7.17, 4: 5.21, 5: 4.50, 6: 4.14, 8: 3.79}
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


def make_model(dataset: str, out: Path) -> Path:
    """Train a byte-level Llama on STEPS minibatches of 32 x 128 bytes of the text; save it to
    `out` and return `out`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = torch.tensor(tokenizer.encode("".join(itertools.islice(documents(dataset), 2000))).ids)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in progress_bar(range(STEPS), desc="training a model", unit="step"):
        batch = torch.stack(
            [tokens[start : start + 128] for start in torch.randint(len(tokens) - 128, (32,))]
        )
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    return out


# --------------------------------------------------------------------------------------------------
# both sides, and the rows of the table


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


def baseline_file(folder: Path) -> Path:
    return next(folder.glob("inference_loss_*.np[yz]"))


def losses_of_theirs(run: Path) -> np.ndarray:
    return np.load(next(run.glob("results/*/loss_training.npy")))


def exact_row(
    what: str, left: object, right: object, difference: float, most: float | None
) -> list[str]:
    """Return a row of numbers that should agree to `most`, or are only shown if `most` is None."""
    wanted, verdict = (
        ("", "shown")
        if most is None
        else (f"≤ {most:g}", "same" if difference <= most else "DIFFERS")
    )
    return [what, str(left), str(right), f"{difference:.2g}", wanted, verdict]


def seeds_row(what: str, left: list[float], right: list[float]) -> list[str]:
    """Return a row that compares one number per seed on each side by a t-test, in units of the
    standard deviation of a run."""
    # at least 1e-6, to which the losses of equal masks agree
    spread = max(math.sqrt((stdev(left) ** 2 + stdev(right) ** 2) / 2), 1e-6)
    apart = fmean(right) - fmean(left)
    most = CRITICAL_T[len(left)] * math.sqrt(2 / len(left))
    cells = [f"{fmean(side):.4f} ± {stdev(side):.4f}" for side in (left, right)]
    return [
        what,
        *cells,
        f"{apart:+.4f}, {abs(apart) / spread:.1f} deviations",
        f"≤ {most:.1f} deviations",
        "same" if abs(apart) <= most * spread else "DIFFERS",
    ]


def score_rows(run: Path, baseline: np.ndarray, lr: float) -> list[list[str]]:
    """Return the rows that compare the authors' score, at recorded steps whose next step is
    recorded too."""
    steps: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for step, logits, mask in torch.load(run / "steps.pt"):
        steps.setdefault(step, []).append((logits.view(-1, 4), mask.view(-1, 4)))
    estimator = Estimator()
    losses = losses_of_theirs(run)
    advantages = [
        estimator.advantage(loss, baseline[step % len(baseline)])
        for step, loss in enumerate(losses)
    ]
    kinds: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    pairs = sorted(
        (step for step in steps if step + 1 in steps), key=lambda step: abs(advantages[step])
    )
    pairs = pairs[len(pairs) // 2 :]  # the largest moves, which suffer least from float32 rounding
    for step in pairs:
        for (before, mask), (after, _) in zip(steps[step], steps[step + 1]):
            # steps count from 1 and advantages from 0, so this is the advantage of step + 1
            found = (before.double() - after.double()) / (lr * advantages[step])
            exact = score(before.double(), mask)
            saturated = before.double().softmax(1).amax(1) > SATURATED
            for kind in kinds:
                kinds[kind].append(torch.stack([found, exact], 1)[saturated == kind])
    rows = []
    for kind, most, name in ((False, 1e-3, "other"), (True, None, "saturated")):
        found, exact = torch.cat(kinds[kind]).unbind(1)
        if len(found):
            rows.append(
                exact_row(
                    f"score, {len(found)} {name} blocks of {len(pairs)} steps: largest",
                    f"{found.abs().max():.4f}",
                    f"{exact.abs().max():.4f}",
                    float((found - exact).abs().max()),
                    most,
                )
            )
    return rows


def compare(
    args: argparse.Namespace, a: Path, b: Path
) -> tuple[list[list[str]], dict[str, np.ndarray], str]:
    """Return the rows, the losses `[seeds, steps]` of both sides, and the fingerprint of m0."""
    m0, other = (
        mask_files.load(path).masks for path in (b / "initial_mask.safetensors", a / "initial_mask")
    )
    baseline = np.load(baseline_file(a))
    cached = np.load(baseline_file(b))["losses"]
    runs = range(args.seeds)
    logs = [read_lines(b / f"seed{seed}/metrics.jsonl") for seed in runs]
    curves = {
        "theirs": np.array([losses_of_theirs(a / f"seed{seed}") for seed in runs]),
        "ours": np.array([[line["loss"] for line in log] for log in logs]),
    }

    def changed(path: Path) -> float:
        masks = mask_files.load(path).masks
        blocks = torch.cat([(masks[name] ^ mask).view(-1, 4).any(1) for name, mask in m0.items()])
        return 100 * blocks.double().mean().item()

    unlike = math.inf
    if m0.keys() == other.keys():
        unlike = sum(int((other[name] ^ mask).sum()) for name, mask in m0.items())
    rows = [
        exact_row("mask: layers, weights that differ", len(other), len(m0), unlike, 0),
        exact_row(
            f"baseline, {len(cached)} minibatches: mean, largest difference (nats)",
            f"{baseline.mean():.6f}",
            f"{cached.mean():.6f}",
            float(abs(baseline - cached).max()),
            1e-6,
        ),
        *score_rows(a / "seed0", baseline, args.lr),
    ]
    for steps in np.array_split(np.arange(curves["ours"].shape[1]), 4):
        rows.append(
            seeds_row(
                f"loss, steps {steps[0] + 1} to {steps[-1] + 1} (nats)",
                *(curve[:, steps].mean(1).tolist() for curve in curves.values()),
            )
        )
    rows.append(
        seeds_row(
            "blocks changed at the end (%)",
            [changed(a / f"seed{seed}/learned_mask") for seed in runs],
            [changed(b / f"seed{seed}/mask.safetensors") for seed in runs],
        )
    )
    return rows, curves, mask_files.fingerprint(m0)


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
        rows, curves, mask = compare(
            args, *run_both(args, Path(work), [*starts, *(start + 1 for start in starts)])
        )
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
