"""Records of evaluate.py as one Markdown table; what is in one column was measured on the same tokens or items."""
import math
from pathlib import Path

from utils import UserError

from evaluation.evaluation_file import read_evaluations


def percent(task: dict, metric: str) -> str:
    """'56.40 ± 0.31', without the error where a single item has none."""
    stderr = task[f"{metric}_stderr"]
    return f"{100 * number(task[metric]):.2f}" + (f" ± {100 * number(stderr):.2f}" if stderr is not None else "")


def cells(record: dict) -> dict[tuple, str]:
    """(order, heading, what else must be equal for numbers to compare) -> cell."""
    row, tasks = {}, record.get("tasks", {})
    if "ppl" in record:
        heading = (f"perplexity, {Path(record['text']).name}, {record['windows']} windows of {record['seqlen']} tokens"
                   f"{' after BOS' if record.get('bos') else ''}")
        row[0, heading, str(record.get("fingerprint"))] = f"{number(record['ppl']):.3f}"
    for name, task in tasks.items():
        row |= {(1, f"{name} {metric} (%, {task['items']} items)", str(task["source"])): percent(task, metric)
                for metric in ("acc", "acc_norm") if metric in task}
    if len(tasks) > 1:
        same = sorted((name, str(task["items"]), str(task["source"])) for name, task in tasks.items())
        row[2, f"mean acc (%, {len(tasks)} tasks)", str(same)] = f"{100 * number(record['mean_acc']):.2f}"
    return row


def number(value: object) -> float:
    """A number that a record holds; ValueError for what is none."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is no result")
    return value


def plain(cell: str) -> str:
    """What ends neither a cell nor a line of a Markdown table."""
    return " ".join(cell.replace("|", "/").split())


def read_row(path: str) -> tuple[list[str], dict]:
    """Name, sparsity and density, and the `cells`, of all evaluations in a file; UserError where there is none."""
    file = Path(path) / "evaluation.json" if Path(path).is_dir() else Path(path)
    name = file.parent if file.name == "evaluation.json" else file
    try:
        evaluations, row = read_evaluations(file), {}
        for record in evaluations:
            row |= cells(record)
        verified = next(filter(None, (record["sparsity_type"] for record in evaluations)), "")
        return [str(name).removesuffix(".json").removesuffix(".evaluation"), str(verified),
                f"{number(evaluations[0]['density']):.6f}"], row
    except Exception as error:  # a damaged record fails in many ways, all of them the record's
        raise UserError(f"--compare {path}: {file} is no record of evaluate.py ({type(error).__name__}: "
                        f"{str(error)[:200]}); make it with evaluate.py")


def comparison(paths: list[str]) -> str:
    """Records as one Markdown table; what is in one column was measured on the same tokens or items."""
    heads, rows = zip(*map(read_row, paths))
    columns = sorted({key: None for row in rows for key in row}, key=lambda key: key[0])
    headings = [heading for _, heading, _ in columns]
    shown = [f"{heading} [{headings[:i + 1].count(heading)}]" if headings.count(heading) > 1 else heading
             for i, heading in enumerate(headings)]
    lines = [["model", "sparsity", "density", *shown], ["---"] * (3 + len(shown)),
             *([*head, *(row.get(key, "") for key in columns)] for head, row in zip(heads, rows))]
    table = "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)
    if all(len(row) == len(columns) for row in rows):
        return table
    return (f"{table}\n\nNot all were measured alike: numbers compare within a column only. Where headings differ in "
            "[1] and [2] alone, the tokens, the items, BOS or the version of the harness do.")
