"""What evaluate.py found of one model or mask, as JSON: its first evaluation, and in `later` those that came after."""
import json
import os
from pathlib import Path

from utils import UserError

from files.records import write_json

ALIKE = {"density": "the density", "dtype": "--dtype", "mask_fingerprint": "the mask"}  # in all evaluations of a file
REMEDY = "choose another file with --save, or remove it"


def read_evaluations(file: Path) -> list[dict]:
    """The evaluations in a file, the first one first; any of many errors where it holds none."""
    first = json.loads(file.read_text(encoding="utf-8"))
    evaluations = [first, *first.get("later", [])]
    if not all(isinstance(found, dict) and isinstance(found.get("tasks", {}), dict) for found in evaluations):
        raise ValueError("an evaluation, or its tasks, is no object")
    return evaluations


def earlier_evaluations(file: Path) -> list[dict]:
    """What another evaluation would be added to, none where there is no file; UserError where it is something else."""
    try:
        return read_evaluations(file) if os.path.lexists(file) else []
    except Exception as error:  # a damaged record fails in many ways
        raise UserError(f"{file} exists already and is no record of evaluate.py ({type(error).__name__}: "
                        f"{str(error)[:200]}); {REMEDY}")


def check_new(file: Path, evaluation: dict) -> None:
    """UserError where a file has one of these results already, or results of another model. evaluation: what is known
    of it before it is made; a text's results are one by its tokens and BOS, a task's by its name."""
    for earlier in earlier_evaluations(file):
        different = [f"{label} ({earlier[key]} there, {evaluation[key]} here)" for key, label in ALIKE.items()
                     if evaluation.get(key) is not None and earlier.get(key) not in (None, evaluation[key])]
        if different:
            raise UserError(f"{file} exists already and is of another model: {', '.join(different)}; {REMEDY}")
        if "fingerprint" in evaluation and all(earlier.get(key, False) == evaluation[key]
                                               for key in ("fingerprint", "bos")):
            raise UserError(f"{file} exists already and holds the perplexity of these tokens, {earlier.get('ppl')}; "
                            f"{REMEDY}")
        twice = evaluation.get("tasks", {}).keys() & earlier.get("tasks", {}).keys()
        if twice:
            raise UserError(f"{file} exists already and holds {', '.join(sorted(twice))}; {REMEDY}")


def add_evaluation(file: Path, evaluation: dict) -> None:
    """Write the first evaluation of a file, or add one, all others as they were; the file is whole at any time."""
    first, *later = [*earlier_evaluations(file), evaluation]
    write_json(file, {**first, "later": later} if later else first)
