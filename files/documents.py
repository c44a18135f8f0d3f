"""The documents of a dataset, one string each. A dataset is one of

    allenai/c4                   its first training shard, en/c4-train.00000-of-01024.json.gz, as the paper uses
    name or name:config          any other hub id, split train
    file.jsonl                   or .json, .jsonl.gz, .json.gz, .parquet: one document a row
    file.txt                     documents are paragraphs, separated by blank lines
    folder/                      what datasets' save_to_disk wrote, or such files, read in sorted order

A document is the string in column `text`, or else in the only column of strings. Of a question, as in evaluate.py's
--task_file, {"context": ..., "choices": [...], "gold": 0}, the right choice makes a document, put behind the context as
evaluation puts it; where none is said to be right, every choice does.
Hub ids need the network the first time. What a user can mend is raised as UserError, a one-line message.
"""
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils import UserError

from files import text_files

READERS = {".jsonl": text_files.json_rows, ".json": text_files.json_rows, ".jsonl.gz": text_files.json_rows,
           ".json.gz": text_files.json_rows, ".parquet": text_files.parquet_rows, ".txt": text_files.paragraphs}
SUFFIXES = tuple(READERS)
C4_TRAIN = {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}


def documents(dataset: str) -> Iterator[str]:
    """Yield the documents of a dataset (see the top of this file) in file order, reading only as far as asked.

    Errors, once reading starts: UserError for no such path or hub id, no network, no text column, a malformed file.
    """
    with explained(dataset):
        if not _is_local(dataset):
            yield from hub_texts(dataset, **_hub_arguments(dataset))
        elif any(Path(dataset, mark).is_file() for mark in ("state.json", "dataset_dict.json")):  # save_to_disk's
            yield from _texts(text_files.saved_rows(Path(dataset)), dataset)
        else:
            for file in _files(dataset):
                kind = next(suffix for suffix in READERS if file.name.endswith(suffix))
                documents_or_rows = READERS[kind](file)
                yield from documents_or_rows if kind == ".txt" else _texts(documents_or_rows, str(file))


def all_documents(dataset: str) -> Sequence[str]:
    """All of them, to be drawn from: a column of a hub dataset stays in its cache, what is local comes into memory.
    UserError where there are none, and those of `documents`."""
    if _is_local(dataset):
        texts = list(documents(dataset))
    else:
        with explained(dataset):
            rows = _loaded(**_hub_arguments(dataset))
            is_column = len(rows) and not _is_question(rows[0])
            texts = rows[_text_column(rows[0], dataset)] if is_column else list(_texts(rows, dataset))
    if len(texts) == 0:
        raise UserError(f"dataset {dataset} holds no documents")
    return texts


def hub_texts(dataset: str, **arguments) -> Iterator[str]:
    """The texts of what datasets.load_dataset gives for these arguments, as they are read; dataset: its name in
    messages."""
    return _texts(_loaded(**arguments, streaming=True), dataset)


@contextmanager
def explained(dataset: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line: gzip, JSON, Arrow, the Hub and the network share no base class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:300]
        advice = ("check that the file is intact" if _is_local(dataset)
                  else "check its spelling, your access to it and the network, or give a local file or folder")
        raise UserError(f"cannot read dataset {dataset} ({reason}): {advice}") from error


def _is_local(dataset: str) -> bool:
    return Path(dataset).exists() or dataset.startswith((".", "/")) or dataset.endswith(SUFFIXES)


def _files(dataset: str) -> list[Path]:
    """The file itself, or the files of a folder that can be read, sorted by name."""
    path, kinds = Path(dataset), ", ".join(READERS)
    if not path.exists():
        raise UserError(f"dataset {dataset}: no such file or folder, check the path")
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise UserError(f"dataset {dataset}: unknown kind of file, give one that ends with {kinds}")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir()
                                                 if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"dataset {dataset}: the folder holds no file that ends with {kinds}")
    return files


def _hub_arguments(dataset: str) -> dict:
    name, _, config = dataset.partition(":")
    return C4_TRAIN if dataset == "allenai/c4" else {"path": name, "name": config or None, "split": "train"}


def _loaded(path: str, **arguments):
    import datasets  # takes a second, which a local file need not wait for
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises anyway
    return datasets.load_dataset(path, verification_mode="no_checks", **arguments)  # one shard is not all a card lists


def _text_column(row: dict, dataset: str) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row and ("text" in strings or row["text"] is None):
        return "text"
    if len(strings) != 1:
        raise UserError(f"dataset {dataset}: no column of strings named text and {len(strings)} columns hold strings "
                        f"(columns: {', '.join(row)}), rename the one with the documents to text")
    return strings[0]


def _is_question(row: dict) -> bool:
    return "text" not in row and isinstance(row.get("context"), str) and isinstance(row.get("choices"), list)


def _right_choices(choices: list, gold: int | None = None, **_others: object) -> list:
    if gold is None:
        return choices
    if gold not in range(len(choices)):
        raise ValueError(f"gold is {gold} where there are {len(choices)} choices")
    return [choices[gold]]


def _texts(rows: Iterable[dict], dataset: str) -> Iterator[str]:
    """The text of each row, where a missing one counts as empty."""
    column = None
    for row in rows:
        if _is_question(row):
            texts = [row["context"] + choice for choice in _right_choices(**row)]
        else:
            column = column or _text_column(row, dataset)
            texts = [row.get(column) or ""]
        for text in texts:
            text.encode()  # half a surrogate pair, which JSON can spell, no tokenizer takes
            yield text
