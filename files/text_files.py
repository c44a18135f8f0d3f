"""Reading text files that nobody vouches for, a document at a time: JSON lines, Parquet, Arrow, plain text.

No name in a file is followed out of its folder, no column is decoded to anything but plain values, and what unpacks to
far more than it is, is refused.
"""
import gzip
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from utils import UserError

import pyarrow
from pyarrow import parquet

from files.atomic import check_name

MOST_BYTES = 2**25  # of one document
MOST_RATIO, FREE_BYTES = 100, 2**20  # unpacked to packed bytes, and up to where that is not looked at
BOMB = f"it unpacks to over {MOST_RATIO} times its size, which no text does"


def paragraphs(file: Path) -> Iterator[str]:
    """The paragraphs of a text, which blank lines separate."""
    with open(file, encoding="utf-8") as lines:
        for is_text, paragraph in itertools.groupby(lines, key=lambda line: bool(line.strip())):
            if is_text:
                yield "".join(paragraph).rstrip("\n")


def json_rows(file: Path) -> Iterator[dict]:
    """The objects of a JSON file, packed or not, that has one a line or is one array of them."""
    most = max(FREE_BYTES, MOST_RATIO * os.path.getsize(file))
    with io.BufferedReader((gzip.open if file.suffix == ".gz" else io.FileIO)(file)) as lines:
        if lines.peek(1).lstrip().startswith(b"["):
            array = lines.read(most + 1)
            if len(array) > most:
                raise ValueError(BOMB)
            rows = json.loads(array)
            yield from (_object(row, f"item {number}") for number, row in enumerate(rows, start=1))
            return
        number = read = 0
        while line := lines.readline(MOST_BYTES + 1):
            number, read = number + 1, read + len(line)
            if len(line) > MOST_BYTES:
                raise ValueError(f"line {number} is longer than {MOST_BYTES} bytes")
            if read > most:
                raise ValueError(BOMB)
            if not line.isspace():
                yield _object(_parsed(line, number), f"line {number}")


def _parsed(line: bytes, number: int):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}")


def _object(row: object, place: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object")
    return row


def parquet_rows(file: Path) -> Iterator[dict]:
    """The rows of a Parquet file."""
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def saved_rows(folder: Path) -> Iterator[dict]:
    """The rows of a dataset that datasets' save_to_disk wrote, split train if it has splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        if "train" not in splits:
            raise UserError(f"dataset {folder} has no split train but {', '.join(splits)}: give the subfolder of one")
        folder = folder / "train"
    for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]:
        name = entry["filename"]
        check_name(name, folder / "state.json")
        with pyarrow.memory_map(str(folder / name)) as file, pyarrow.ipc.open_stream(file) as batches:
            for batch in batches:
                batch.validate(full=True)  # Arrow itself trusts the offsets in a file
                yield from batch.to_pylist()
