"""The README's results of --preset fast on a real model: SmolLM2-135M, 2:4, from text that the model generates.

    make demo DEMO_FLAGS=--quick                                        # first: the model
    python reproduce/preset_fast.py --ppl WIKITEXT demo/heldout.txt        # half an hour for each seed and order
    python reproduce/preset_fast.py --ppl WIKITEXT --orders given --steps 97 --tokens 100000 --seeds 0     # ten minutes
    python reproduce/preset_fast.py --ppl WIKITEXT --task_file piqa.jsonl arc_easy.jsonl     # accuracy as well
    python reproduce/preset_fast.py --ppl WIKITEXT --task_file piqa.jsonl --questions others.jsonl  # and from some
    python reproduce/preset_fast.py --ppl WIKITEXT --after reproduce/articles.jsonl        # half of it after passages

For each seed the model generates text, and the preset learns from it: from a Wanda mask of the model as it is given,
and of the same model with its channels reordered (permute.py). Wanda and the order are calibrated on demo/train.jsonl.
With --after, half of the text goes on from these passages (generate_text.py). --questions are learned from beside the
text, with their right answers: give none that --task_file has. reproduce/articles.jsonl has twelve short articles,
written and made up for this, in the manner of WikiText: its kinds of subject, its headings, its spaces between words.
WIKITEXT is a text file; perplexity is of 64 windows of 512 tokens. The table has the mean ± deviation over seeds; the
gap is that in log perplexity (or accuracy) between dense and the Wanda mask of the given model; minutes are
the median that a run's scripts took for text, order, Wanda and learning, whatever else the machine did; of learning
that was interrupted, the part since then.

What is made stays in --out, so that a run that was interrupted goes on, and further texts, seeds and steps are added.
"""
import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import UserError, positive_int, run_script

from demo import script

MODEL, TEXT = ROOT / "demo/model", ROOT / "demo/train.jsonl"
LABELS = {"given": "learned, `--preset fast`", "reordered": "learned, channels reordered"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", nargs="+", required=True, help="held-out text files")
    parser.add_argument("--task_file", nargs="+", default=[], help="multiple-choice items, as of evaluate.py")
    parser.add_argument("--questions", nargs="+", default=[], help="such items, to learn from")
    parser.add_argument("--after", default=None, help="passages that half of the generated text goes on from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--steps", type=positive_int, default=560)
    parser.add_argument("--tokens", type=positive_int, default=250_000, help="to generate and to learn from")
    parser.add_argument("--windows", type=positive_int, default=64)
    parser.add_argument("--train_flags", default="", help="further ones, in one string, such as '--lr 1.2'")
    parser.add_argument("--out", default="demo/preset_fast")
    return parser.parse_args(argv)


class Kept:
    """A folder of outputs, each made once, and the seconds that it took."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, name: str, *command: object) -> float:
        """Run a script that writes the output of this name, unless it is there; the seconds that it took."""
        record = self.folder / f"{name}.seconds"
        if not (record.exists() and (self.folder / name).exists()):
            started = time.monotonic()
            script(*command)
            record.write_text(f"{time.monotonic() - started:.1f}\n")
        return float(record.read_text())


def wanda_mask(kept: Kept, order: str) -> tuple[Path, Path, float]:
    """The model in this order, its Wanda mask, and the seconds that they took."""
    model, mask, seconds = MODEL, kept.folder / f"{order}_wanda.safetensors", 0.0
    calibration = ["--dtype", "auto", "--dataset", TEXT, "--nsamples", 64, "--seqlen", 256]
    if order == "reordered":
        model = kept.folder / "model"
        seconds += kept.make("model", "permute.py", "--model", MODEL, *calibration, "--save_model", model)
    pruned = kept.folder / f"{order}_wanda"
    seconds += kept.make(pruned.name, "prune.py", "--model", model, "--prune_method", "wanda", *calibration,
                         "--save_model", pruned)
    return model, mask, seconds + kept.make(mask.name, "get_mask.py", "--model", pruned, "--save", mask)


def evaluated(kept: Kept, args: argparse.Namespace, name: str, model: Path, mask: Path | None) -> dict[str, float]:
    """Log perplexity of each text, and mean accuracy in percent, of a mask or of the dense model."""
    found = {}
    base = ["evaluate.py", "--model", model, "--dtype", "auto", *(["--mask", mask] if mask else [])]
    for text in args.ppl:
        record = f"{name}.{Path(text).stem}-{args.windows}.json"
        kept.make(record, *base, "--ppl", text, "--seqlen", 512, "--nwindows", args.windows, "--save",
                  kept.folder / record)
        found[f"perplexity, {Path(text).stem}"] = json.loads((kept.folder / record).read_text())["nats"]
    if args.task_file:
        record = f"{name}.{'+'.join(Path(file).stem for file in args.task_file)}.json"
        kept.make(record, *base, "--ppl", "none", "--task_file", *args.task_file, "--save", kept.folder / record)
        found["accuracy (%)"] = 100 * json.loads((kept.folder / record).read_text())["mean_acc"]
    return found


def learned_text(kept: Kept, args: argparse.Namespace, seed: int, names: str) -> tuple[Path, float]:
    """The text of a seed, and the seconds that it took: generated, half of it after passages where there are some, and
    the questions; the same for every order and length of run. names: of the files that it is made with."""
    kinds = {"text": []} | ({Path(args.after).stem: ["--after", args.after]} if args.after else {})
    tokens, parts, seconds = args.tokens // len(kinds), [], 0.0
    for kind, flags in kinds.items():
        parts.append(kept.folder / f"{kind}{seed}-{tokens}.jsonl")
        seconds += kept.make(parts[-1].name, "generate_text.py", "--model", MODEL, "--dtype", "auto", "--tokens",
                             tokens, "--seed", seed, "--out", parts[-1], *flags)
    parts += map(Path, args.questions)
    if len(parts) == 1:
        return parts[0], seconds
    out = kept.folder / f"text{seed}-{args.tokens}{names}.jsonl"
    out.write_bytes(b"".join(part.read_bytes().strip() + b"\n" for part in parts))
    return out, seconds


def learned(kept: Kept, args: argparse.Namespace, order: str, seed: int) -> tuple[dict[str, float], float]:
    """What one run's mask comes to, and the minutes of everything before its evaluation."""
    model, m0, seconds = wanda_mask(kept, order)
    names = "".join("+" + Path(file).stem for file in filter(None, [args.after, *args.questions]))
    text, taken = learned_text(kept, args, seed, names)
    tokens = text.stat().st_size if names else args.tokens  # all of it: no text has more tokens than bytes
    flags = args.train_flags.split()
    name = f"{order}{seed}-{args.tokens}-{args.steps}{''.join(flags).replace('--', '-')}{names}"
    run = kept.folder / name
    start = ["--model", model, "--dtype", "auto", "--mask", m0, "--dataset", text, "--preset", "fast", "--tokens",
             tokens, "--max_step", args.steps, "--epoch", args.steps, "--seed", seed, "--skip_checkpoint", *flags,
             "--out", run]
    taken += kept.make(name, "train.py", *(["--resume", run] if (run / "run.json").exists() else start))
    return evaluated(kept, args, name, model, run / "mask.safetensors"), (seconds + taken) / 60


def mean_and_deviation(values: list[float], write: Callable[[float], float] = float) -> str:
    """'43.44 ± 0.31', of the values as `write` shows them; without the deviation where there is one."""
    shown = [write(value) for value in values]
    return f"{statistics.mean(shown):.2f}" + (f" ± {statistics.stdev(shown):.2f}" if len(shown) > 1 else "")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for files in (args.ppl, args.task_file, args.questions):
        if len({Path(file).stem for file in files}) < len(files):
            raise UserError("two of these files have one name, which what is made from them goes by; rename one")
    if not MODEL.exists():
        raise UserError(f"there is no {MODEL}; `make demo DEMO_FLAGS=--quick` makes it")
    kept = Kept((ROOT / args.out).resolve())
    dense = evaluated(kept, args, "dense", MODEL, None)
    given, mask, seconds = wanda_mask(kept, "given")
    wanda = evaluated(kept, args, "wanda", given, mask)
    rows = [("dense", [dense], None), ("Wanda", [wanda], seconds / 60)]
    for order in args.orders:
        runs, minutes = zip(*(learned(kept, args, order, seed) for seed in args.seeds))
        rows.append((f"{LABELS[order]}, {args.steps} steps", runs, statistics.median(minutes)))

    print(f"\nSmolLM2-135M, 2:4, {args.tokens} tokens of generated text, seeds {args.seeds}\n")
    print("| mask | " + " | ".join(f"{name} | of the gap (%)" for name in dense) + " | minutes |")
    print("|---" * (2 * len(dense) + 2) + "|")
    for label, runs, minutes in rows:
        cells = []
        for name in dense:
            values = [run[name] for run in runs]
            closed = [100 * (wanda[name] - value) / (wanda[name] - dense[name]) for value in values]
            cells += [mean_and_deviation(values, math.exp if name.startswith("perplexity") else float),
                      mean_and_deviation(closed) if label not in ("dense", "Wanda") else ""]
        print(f"| {label} | " + " | ".join(cells) + f" | {'' if minutes is None else f'{minutes:.1f}'} |")


if __name__ == "__main__":
    run_script(main)
