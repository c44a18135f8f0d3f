"""Renders the tables of the docs from the records in reproduce/records/.

    python reproduce/tables.py
    python reproduce/tables.py --check      # exit code 1 if a table differs from the records

The first command rewrites the text between <!-- NAME --> and <!-- end NAME --> in the docs; the
second serves as a test. A new table needs a function that returns Markdown, in TABLES, and two such
lines in a page.
"""

import argparse
import re
import sys
from pathlib import Path

import variance as signal
from record import POINTS, row_cells
from rows import ABLATIONS, FALLS, SIGNALS, record, small

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from evaluation.comparison import markdown_table
from training.report import perplexity_table, sparsified
from utils import run_script

import numpy as np
from rivals import table as of_methods
from smollm2_tables import after_the_mask, one_shot, results, rivals, summary

PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
# the conditions below a bench's table
BENCH = "\n\n{hardware}, torch {torch}, seed {seed}, commit {commit}."


def ablations() -> str:
    """Return the table of ablations on the small model at 1:4."""
    rows = record("small_model")["rows"]
    lines = []
    for setting, row, seeds in ABLATIONS:
        _, nats, gap, *_ = row_cells(rows, small(*row), seeds)
        lines.append([setting, nats, gap])
    return markdown_table(["setting", "held-out loss", "gap recovered (%)"], lines)


def patterns() -> str:
    """Return the table of the small model at several patterns."""
    rows = record("small_model")["rows"]
    lines = []
    for heading, learned in (
        ("1:4", small("maskpro", 512, 5, 5)),
        ("2:4", "2of4/maskpro-size512-lr5-logits5-steps2500"),
        ("2:4, 10,000 steps", "2of4/maskpro-size512-lr5-logits5-steps10000"),
        ("4:8", "4of8/maskpro-size512-lr5-logits5-steps2500"),
    ):
        folder = learned.partition("/")[0]
        lines.append(
            [
                heading,
                *(
                    row_cells(rows, f"{folder}/{method}")[1]
                    for method in ("magnitude", "wanda", "sparsegpt")
                ),
                row_cells(rows, learned, 1)[1],
            ]
        )
    heading = ["N:M", "magnitude", "Wanda, m0", "SparseGPT (updates weights)", "maskpro"]
    return markdown_table(heading, lines)


def conditions() -> str:
    """Return the conditions of the small model's tables."""
    rows = record("small_model")["rows"]
    runs = [seed["run"] for seeds in rows.values() for seed in seeds if "run" in seed]
    known = {
        key: sorted({run["environment"][key] for run in runs})
        for key in ("hardware", "commit", "torch")
    }
    dtypes = sorted({seed["dtype"] for seeds in rows.values() for seed in seeds})
    seconds = sorted(run["seconds"] for run in runs)
    hardware = "; ".join(known["hardware"]).replace("1 threads", "1 thread")
    return (
        f"The dense loss is {rows['dense'][0]['nats']:.4f}. Each run took {seconds[0]:.0f} to "
        f"{seconds[-1]:.0f} s ({hardware}; {', '.join(dtypes)}, torch "
        f"{', '.join(known['torch'])}, commits {', '.join(known['commit'])})."
    )


def small_rivals() -> str:
    """Return the table of the record that bench/rivals.py --json wrote."""
    runs = record("rivals")
    rows = of_methods(runs)
    columns = list(rows[0])
    lines = [[row.get(column, "") for column in columns] for row in rows]
    machines = "; ".join(dict.fromkeys(run["hardware"] for run in runs))
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    return (
        f"{markdown_table(columns, lines)}\n\nDense {runs[0]['dense loss']:.4f}, m0 "
        f"{runs[0]['m0 loss']:.4f}; {machines}; torch {runs[0]['torch']}, commits {commits}."
    )


def scaling() -> str:
    """Return the table of the record of bench/scaling.py: a row per way to learn, with 2 and with 4
    processes."""
    rows = record("scaling")
    sent = "sent a process and step (bytes)"
    learners = {}
    for row in rows:
        learners.setdefault(row["learning"], {})[row["processes"]] = row
    lines = []
    for learning, runs in learners.items():
        apart = max(row["logits apart from one process's, at most"] for row in runs.values())
        lines.append([learning, f"{runs[2][sent]:,}", f"{runs[4][sent]:,}", f"{apart:.1e}"])
    heading = ["learning", "2 processes", "4 processes", "largest difference"]
    return markdown_table(heading, lines) + BENCH.format(**rows[0])


def example() -> str:
    """Return the tables of one run of sparsify.py, from its report.json."""
    run = record("one_command")
    given = run["arguments"]
    here = run["environment"]
    stages = [
        [name, f"{stage['seconds'] / 60:.1f}", f"{stage['peak_memory_bytes'] / 2**30:.2f}"]
        for name, stage in run["stages"].items()
    ]
    stages = markdown_table(["stage", "minutes", "peak memory (GiB)"], stages)
    return (
        f"{perplexity_table(run['nats'])}\n\n{stages}\n\n{run['summary']['steps']} steps, "
        f"SmolLM2-135M, {here['hardware']}, seed {given['seed']}, commit {here['commit']}."
    )


def printed() -> str:
    """Return the output of the README's command, without the sample of text, from the record
    twenty_steps, which is the report.json of a run."""
    run = record("twenty_steps")
    said = sparsified({**run, "sample": {}}, run["summary"]).strip()
    minutes = sum(stage["seconds"] for stage in run["stages"].values()) / 60
    here = run["environment"]
    return (
        f"```\n{said}\n```\n\n({minutes:.0f} minutes, {here['hardware']}, commit {here['commit']})"
    )


def step() -> str:
    """Return the table of the record that bench/step.py --json wrote."""
    rows = record("step")
    columns = ["naive (s)", "ours (s)", "of a forward"]
    lines = [
        [
            row["what"].replace("torch.", ""),
            *(f"{row[key]:.3g}" if key in row else "" for key in columns),
        ]
        for row in rows
        if "later" not in row["what"]
    ]
    heading = ["", *columns[:-1], "forward passes"]
    return markdown_table(heading, lines) + BENCH.format(**rows[0])


def memory() -> str:
    """Return the table of the record that bench/memory.py --json wrote."""
    rows = record("memory")
    numbers = ("kept (bytes a weight)", "predicted (MiB)", "used (MiB)")
    lines = [
        [
            row["learning"],
            row["logits"],
            str(row["processes"]),
            *(f"{row[key]:,.4g}" if key in row else "" for key in numbers),
        ]
        for row in rows
        if row["learning"] != "gradients, checkpointing"
    ]
    heading = ["learning", "logits", "processes", "kept (bytes per weight)", *numbers[1:]]
    return markdown_table(heading, lines) + BENCH.format(**rows[0])


def authors() -> str:
    """Return the table that compares the authors' scripts with ours: the quantities that have a
    limit and, of the losses, the one that differs most."""
    judged = [row for row in record("against_authors")["table"] if row["wanted"]]
    losses = [row for row in judged if row["what"].startswith("loss")]
    apart = max(losses, key=lambda row: float(row["difference"].split()[1]))
    lines = [
        [row["what"].replace("other", "unsaturated"), *list(row.values())[1:5]]
        for row in judged
        if row is apart or row not in losses
    ]
    return markdown_table(["quantity", "theirs", "ours", "difference", "limit"], lines)


def variance() -> str:
    """Return the table of the estimators' signal and noise."""
    lines = [[model, *signal.row(row)] for model, name in SIGNALS for row in record(name)["rows"]]
    machines = {}
    for model, name in SIGNALS:
        draws = record(name)["arguments"]["samples"]
        hardware = record(name)["environment"]["hardware"]
        machines.setdefault(hardware, []).append(f"{model} ({draws} draws)")
    return (
        markdown_table(["model", *signal.HEADING], lines)
        + "\n\n"
        + " ".join(f"{hardware}: {'; '.join(rows)}." for hardware, rows in machines.items())
    )


def falls() -> str:
    """Return the table that compares the fall of the loss predicted from the signal with that of
    runs in their first quarter."""
    lines = []
    for what, signals, name, row in FALLS:
        runs = [seed["run"] for seed in record(name)["rows"][row]] if row else [record(name)]
        arguments = runs[0]["arguments"]
        steps = runs[0].get("steps") or runs[0]["summary"]["steps"]
        here = ["{}:{}".format(*arguments["sparsity_type"]), arguments["logits"]]
        (found,) = [
            found for found in record(signals)["rows"] if [found["pattern"], found["C"]] == here
        ]
        # points of the curve in the first quarter of the planned steps
        points = POINTS * (steps if runs[0]["summary"] else arguments["max_step"]) // (4 * steps)
        curve = np.mean([run.get("residuals", run["curve"])[:points] for run in runs], 0)
        fit, covariance = np.polyfit(np.arange(points) * steps / POINTS, curve, 1, cov=True)
        lines.append(
            [
                what,
                f"{arguments['lr']:g}",
                f"{arguments['lr'] * found['signal']:.1e}",
                f"{-fit[0]:.1e} ± {covariance[0, 0] ** 0.5:.0e}",
            ]
        )
    return markdown_table(["run", "η", "predicted fall per step, η‖g‖²", "measured"], lines)


TABLES = (
    example,
    printed,
    summary,
    results,
    one_shot,
    rivals,
    small_rivals,
    after_the_mask,
    scaling,
    step,
    memory,
    ablations,
    patterns,
    conditions,
    authors,
    variance,
    falls,
)


def rendered(page: str) -> str:
    """Return a page's text with its tables rendered again."""
    for table in TABLES:
        name = table.__name__
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)",
            lambda found, table=table: f"{found[1]}{table()}\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    args = parser.parse_args(argv)
    stale = []
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(page)
            if not args.check:
                (ROOT / page).write_text(after, encoding="utf-8")
    print(
        f"{', '.join(stale) or 'no page'}: "
        f"{'other than the records' if args.check else 'made anew'}"
    )
    sys.exit(1 if stale and args.check else 0)


if __name__ == "__main__":
    run_script(main)
