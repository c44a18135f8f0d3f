"""The documents of a dataset, one string each. A dataset is one of

    allenai/c4                   its first training shard, en/c4-train.00000-of-01024.json.gz, which
                                 the paper uses
    name or name:config          any other hub id, split train
    file.jsonl                   or .json, .jsonl.gz, .json.gz, .parquet: one document per row
    file.txt                     documents are paragraphs, separated by blank lines
    folder/                      output of save_to_disk of datasets, or such files, read in sorted
                                 order

A document is the string in column `text`, or in the only column of strings. A row may also be a
question, as in eval.py's --task_file: {"context": ..., "choices": [...], "gold": 0}. Its document
is the context followed by the right choice, joined as evaluation joins them; without "gold", every
choice makes a document. Hub ids are streamed, not stored: they need the network every time. Errors
that a user can mend are raised as UserError, with a message of one line.
"""

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from files import hub
from utils import UserError, as_user_error, note

from pyarrow import parquet

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt")
SAVED = ("state.json", "dataset_dict.json")  # files by which a folder of save_to_disk is known
C4_TRAIN = {
    "path": "allenai/c4",
    "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
    "split": "train",
}
INTACT = "check that the file is intact"
ACCESS = "check its spelling, your access to it and the network, or give a local file"


def documents(dataset: str) -> Iterator[str]:
    """Yield the documents of a dataset (see the top of this file) in file order, reading lazily.

    Raises UserError, once reading starts, if there is no such path or hub id, no network or no text
    column, or if a file is malformed.
    """
    if not _is_local(dataset):
        yield from hub_texts(dataset, **_hub_arguments(dataset))
        return
    for file in _files(Path(dataset)):
        with as_user_error(f"dataset {file}", INTACT):
            yield from _texts(_rows(file))


def are_questions(dataset: str) -> bool:
    """Return whether the first row of a dataset is a question. Raises the errors of `documents`."""
    is_local = _is_local(dataset)
    source, advice = (_files(Path(dataset))[0], INTACT) if is_local else (dataset, ACCESS)
    with as_user_error(f"dataset {source}", advice):
        rows = _rows(source) if is_local else _hub_rows(**_hub_arguments(dataset))
        return any(map(_is_question, itertools.islice(rows, 1)))


def hub_texts(dataset: str, **arguments) -> Iterator[str]:
    """Yield the documents that datasets.load_dataset streams for these arguments. dataset: the name
    in messages."""
    with as_user_error(f"dataset {dataset}", ACCESS):
        yield from _texts(_hub_rows(**arguments))


def _hub_rows(**arguments) -> Iterable[dict]:
    hub.answers()
    import datasets  # takes a second, which local files are spared

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also raises what it logs
    # a single shard fails the checks against the dataset's card
    return datasets.load_dataset(**arguments, verification_mode="no_checks", streaming=True)


def check_paths(files: Iterable[str | None], texts: Iterable[str | None] = ()) -> None:
    """Raise UserError with the names of all files that do not exist, before anything is loaded.
    texts may also be hub ids."""
    missing = [name for name in files if name and not Path(name).expanduser().exists()]
    missing += [name for name in texts if name and _is_local(name) and not Path(name).exists()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file or folder, check the path")


def _is_local(dataset: str) -> bool:
    return Path(dataset).exists() or dataset.startswith((".", "/")) or dataset.endswith(SUFFIXES)


def _hub_arguments(dataset: str) -> dict:
    name, _, config = dataset.partition(":")
    return (
        C4_TRAIN
        if dataset == "allenai/c4"
        else {"path": name, "name": config or None, "split": "train"}
    )


# --------------------------------------------------------------------------------------------------
# from files to rows, from rows to texts


def _files(path: Path) -> list[Path]:
    """Return the path itself or, for a folder, its files of known types, sorted by name. A folder
    of save_to_disk counts as one file."""
    if not path.exists():
        raise UserError(f"dataset {path}: no such file or folder, check the path")
    if any((path / mark).is_file() for mark in SAVED):
        return [path]
    files = [
        file
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file() and file.name.endswith(SUFFIXES)
    ]
    if not files:
        raise UserError(
            f"dataset {path}: there is no file that ends with {', '.join(SUFFIXES)}; give one"
        )
    return files


def _rows(file: Path) -> Iterator[dict]:
    """Yield the rows of a file; in a .txt, a row is a paragraph."""
    if file.is_dir():
        import datasets

        yield from datasets.load_from_disk(file / "train" if (file / SAVED[1]).is_file() else file)
    elif file.name.endswith(".txt"):
        with open(file, encoding="utf-8-sig") as lines:
            for is_text, paragraph in itertools.groupby(lines, key=lambda line: bool(line.strip())):
                if is_text:
                    yield {"text": "".join(paragraph).rstrip("\n")}
    elif file.name.endswith(".parquet"):
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    else:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            first_line = lines.readline()
            if first_line.lstrip().startswith(b"["):  # the file is one array of rows
                yield from json.loads(first_line + lines.read())
                return
            for number, line in enumerate(itertools.chain([first_line], lines), 1):
                if line.strip():
                    yield _parsed(line, number)


def _parsed(line: bytes, number: int) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}")


def _texts(rows: Iterable[dict]) -> Iterator[str]:
    """Yield the documents of the rows. A missing text counts as empty; a question gives its context
    with a choice."""
    column = None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object")
        if _is_question(row):
            choices = row["choices"]
            gold = row.get("gold")
            if gold is not None and gold not in range(len(choices)):
                raise ValueError(f"gold is {gold}, but there are {len(choices)} choices")
            texts = [
                row["context"] + choice for choice in (choices if gold is None else [choices[gold]])
            ]
        else:
            if not column:
                column = _text_column(row)
                if column != "text":
                    note(
                        "there is no column named text: documents are read from the column "
                        f"{column}"
                    )
            texts = [row.get(column) or ""]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"row {number} has no string where its document should be")
            text.encode()  # raises for lone surrogates, which JSON can hold but no tokenizer takes
            yield text


def _text_column(row: dict) -> str:
    columns = (
        ["text"]
        if "text" in row
        else [name for name, value in row.items() if isinstance(value, str)]
    )
    if len(columns) != 1:
        raise UserError(
            f"no column named text and {len(columns)} columns hold strings (columns: "
            f"{', '.join(row)}), rename the one with the documents to text"
        )
    return columns[0]


def _is_question(row: object) -> bool:
    return (
        isinstance(row, dict)
        and "text" not in row
        and isinstance(row.get("context"), str)
        and isinstance(row.get("choices"), list)
    )
