"""Renders several models' records as one Markdown table. All numbers in a column were measured on
the same tokens or items."""

import json
from pathlib import Path

from utils import as_user_error


def percent(task: dict, metric: str) -> str:
    """Return a metric in percent: '56.40 ± 0.31', or '56.40' if there is no standard error, as for
    a single item."""
    stderr = task[f"{metric}_stderr"]
    return f"{100 * task[metric]:.2f}" + (f" ± {100 * stderr:.2f}" if stderr is not None else "")


def cells(record: dict) -> dict[tuple[int, str, str], str]:
    """Return the numbers of a record as (group of columns, heading, fingerprint of the tokens or
    items) -> cell."""
    row = {}
    tasks = record.get("tasks", {})
    dtype = record["dtype"]
    if "ppl" in record:
        heading = (
            f"perplexity, {Path(record['text']).name}, {record['windows']} windows of "
            f"{record['seqlen']} tokens{' after BOS' if record.get('bos') else ''}, {dtype}"
        )
        row[0, heading, str(record["fingerprint"])] = f"{record['ppl']:.3f}"
    for name, task in tasks.items():
        row |= {
            (
                1,
                f"{name} {metric} (%, {task['items']} items, {dtype})",
                str(task["source"]),
            ): percent(task, metric)
            for metric in ("acc", "acc_norm")
            if metric in task
        }
    if len(tasks) > 1:
        measured = sorted(
            (name, str(task["items"]), str(task["source"])) for name, task in tasks.items()
        )
        row[2, f"mean acc (%, {len(tasks)} tasks, {dtype})", str(measured)] = (
            f"{100 * record['mean_acc']:.2f}"
        )
    return row


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, one line per row. Inside cells, | becomes / and line breaks become
    spaces."""
    lines = [
        [" ".join(cell.replace("|", "/").split()) for cell in line]
        for line in (heading, ["---"] * len(heading), *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(records: list[tuple[str, dict]]) -> str:
    """Return a Markdown table with a row for each (name, record). Numbers share a column only if
    they were measured on the same tokens or items.

    A record has `sparsity_type` ("2:4" or None) and `density`. With a perplexity, it also has the
    fields of `eval.evaluate_text`; with tasks, `tasks` (name -> a result of `run_harness`) and
    `mean_acc`.
    """
    rows = [cells(record) for _, record in records]
    columns = sorted({key: None for row in rows for key in row}, key=lambda key: key[0])
    table = markdown_table(
        ["model", "sparsity", "density", *(heading for _, heading, _ in columns)],
        [
            [
                name,
                str(record["sparsity_type"] or ""),
                f"{record['density']:.6f}",
                *(row.get(key, "") for key in columns),
            ]
            for (name, record), row in zip(records, rows)
        ],
    )
    note = (
        "\n\nCompare numbers within a column only: different columns use different tokens, items "
        "or versions of the harness."
    )
    return table if all(len(row) == len(columns) for row in rows) else table + note


def read_evaluation(file: Path) -> tuple[str, dict]:
    """Return the name and the record of a JSON file of eval.py. Raises UserError if it is not
    one."""
    with as_user_error(file, "give a record of eval.py"):
        record = json.loads(file.read_text(encoding="utf-8"))
        comparison([("", record)])  # raises if a field is missing
    return str(file.with_suffix("")), record
