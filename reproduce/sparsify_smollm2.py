"""The README's results of sparsify.py on a real model: SmolLM2-135M, 2:4.

    make demo DEMO_FLAGS=--quick            # first: the model and the texts
    python reproduce/sparsify_smollm2.py --ppl WIKITEXT demo/heldout.txt                 # half an hour a run, 6 runs
    python reproduce/sparsify_smollm2.py --ppl WIKITEXT --steps 280 --after reproduce/articles.jsonl
    python reproduce/sparsify_smollm2.py --ppl WIKITEXT --orders given --seeds 0 --steps 97             # ten minutes
    python reproduce/sparsify_smollm2.py --ppl WIKITEXT --task_file piqa.jsonl arc_easy.jsonl    # accuracy as well
    python reproduce/sparsify_smollm2.py --ppl WIKITEXT --task_file quiz.jsonl --steps 400 --distill 0.5 \\
        --dataset OTHER_QUESTIONS.jsonl 'demo/text{seed}.jsonl'        # questions, and text of generate_text.py

Each seed makes a run of sparsify.py for each order of the channels: as the model has them, and reordered (--permute).
sparsify.py gets all flags that are not listed below; in them {seed} stands for the seed. The Wanda row is calibrated
on demo/train.jsonl. WIKITEXT is a text file; perplexity is of 64 windows of 512 tokens. Learn from no question that
--task_file has. reproduce/articles.jsonl has twelve short articles, made up for this in the manner of WikiText.

The table shows the mean ± the deviation over seeds. The gap lies between Wanda and dense, in log perplexity or in
accuracy. Minutes are the median over seeds of all stages of a run; text that was generated before is not counted.

All runs and evaluations stay in --out. The same command again goes on with a series that was interrupted; further
texts, seeds and orders are added. Paths are relative to the root of the repository.
"""
import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation.comparison import markdown_table
from utils import UserError, run_script

MODEL, TEXT = Path("demo/model"), Path("demo/train.jsonl")
ORDERS = {"given": [], "reordered": ["--permute"]}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the flags for sparsify.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--ppl", nargs="+", required=True, help="held-out text files")
    parser.add_argument("--task_file", nargs="+", default=[], help="multiple-choice items, as of eval.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS), help="of the channels")
    parser.add_argument("--out", type=Path, default=Path("demo/sparsify_smollm2"), help="folder of what is made")
    return parser.parse_known_args(argv)


def once(output: Path, *command: object) -> dict:
    """Run a script of the repository unless its output is there; what the output says where it is a JSON file."""
    if not (ROOT / output).exists():
        print("\n$ python " + " ".join(map(str, command)), flush=True)
        code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=False).returncode
        if code:
            sys.exit(code)  # the script has said why
    return json.loads((ROOT / output).read_text()) if output.suffix == ".json" else {}


def file_name(words: list[str]) -> str:
    """A name for what these words make."""
    return re.sub(r"[^\w.-]+", "_", " ".join(words))


def evaluated(args: argparse.Namespace, model: Path, name: str) -> dict[str, float]:
    """Log perplexity of each text, and mean accuracy in percent."""
    def evaluate(files: list[str], *flags: object) -> dict:
        record = args.out / f"{name}.{file_name(files)}.json"
        return once(record, "eval.py", "--model", model, "--dtype", "auto", *flags, "--save", record)

    found = {f"perplexity, {text}": evaluate([text], "--ppl", text, "--seqlen", 512, "--nwindows", 64)["nats"]
             for text in args.ppl}
    if args.task_file:
        record = evaluate(args.task_file, "--ppl", "none", "--task_file", *args.task_file)
        found["accuracy (%)"] = 100 * record["mean_acc"]
    return found


def learned(args: argparse.Namespace, flags: list[str], order: str, seed: int) -> tuple[dict[str, float], float]:
    """What evaluation finds of one run's sparse model, and the minutes of the run."""
    name = file_name([f"{order}{seed}", *flags])
    run = args.out / name
    flags = [flag.replace("{seed}", str(seed)) for flag in flags]
    start = ["--model", MODEL, "--seed", seed, *ORDERS[order], *flags, "--out", run]
    report = once(run / "report.json", "sparsify.py", *(["--resume", run] if (ROOT / run).exists() else start))
    return evaluated(args, run / "checkpoint", name), sum(stage["seconds"] for stage in report["stages"].values()) / 60


def cell(values: list[float]) -> str:
    """'43.44 ± 0.31', or '43.44' of one."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main(argv: list[str] | None = None) -> None:
    args, flags = parse_args(argv)
    if not (ROOT / MODEL).exists():
        raise UserError(f"there is no {MODEL}; `make demo DEMO_FLAGS=--quick` makes it")
    pruned = args.out / "wanda"
    summary = once(pruned / "prune.json", "prune.py", "--model", MODEL, "--dtype", "auto", "--prune_method", "wanda",
                   "--dataset", TEXT, "--nsamples", 64, "--seqlen", 256, "--save_model", pruned)["summary"]
    dense, wanda = evaluated(args, MODEL, "dense"), evaluated(args, pruned, "wanda")
    rows = [("dense", [dense], ""), ("Wanda", [wanda], f"{summary['seconds'] / 60:.1f}")]
    for order in args.orders:
        runs, minutes = zip(*(learned(args, flags, order, seed) for seed in args.seeds))
        rows.append((" ".join(["learned", *ORDERS[order], *flags]), runs, f"{statistics.median(minutes):.1f}"))

    lines = []
    for label, runs, minutes in rows:
        lines.append([label])
        for name in dense:
            values = [run[name] for run in runs]
            closed = [100 * (wanda[name] - value) / (wanda[name] - dense[name]) for value in values]
            lines[-1] += [cell([math.exp(value) for value in values] if name.startswith("perplexity") else values),
                          cell(closed) if label.startswith("learned") else ""]
        lines[-1].append(minutes)
    heading = ["mask", *(column for name in dense for column in (name, "of the gap (%)")), "minutes"]
    print(f"\nSmolLM2-135M, 2:4, seeds {args.seeds}\n\n{markdown_table(heading, lines)}")


if __name__ == "__main__":
    run_script(main)
