"""What the campaigns share: flags, and counts out as a Markdown table."""
import argparse
import json
import sys
from pathlib import Path

from utils import environment


def make_parser(docstring: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of each")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, or when a run is killed")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the rows to this file too")
    return parser


def table(rows: list[dict]) -> str:
    """Rows as one Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(rows: list[dict], args: argparse.Namespace, note: str = "", before: list[dict] = ()) -> None:
    """Print a table under the command and the environment that it is of; with --json write its rows with these, those
    of a table `before` it first."""
    conditions = {**environment(), "seed": args.seed,
                  "command": " ".join(["python tests/faults/" + Path(sys.argv[0]).name, *sys.argv[1:]])}
    print(f"\n{conditions['command']}  ({conditions['hardware']}, torch {conditions['torch']}, "
          f"commit {conditions['commit']}, seed {args.seed})\n\n{table(rows)}")
    if note:
        print("\n" + note)
    if args.json:
        Path(args.json).write_text(json.dumps([{**row, **conditions} for row in (*before, *rows)],
                                              indent=1) + "\n")
