"""Text into tokens: training minibatches, calibration samples and perplexity windows.

Every function takes a Hugging Face tokenizer and a dataset, which is one of
    allenai/c4                   its first training shard, en/c4-train.00000-of-01024.json.gz, as the paper uses
    name or name:config          any other hub id, split train
    file.jsonl                   or .json, .jsonl.gz, .json.gz, .parquet: one document a row
    file.txt                     documents are paragraphs, separated by blank lines
    folder/                      what datasets' save_to_disk wrote, or such files, read in sorted order
A document is the string in column `text`, or else in the only column of strings. Of a question, as in evaluate.py's
--task_file, {"context": ..., "choices": [...]}, every choice makes a document, put behind the context as it is judged.
Hub ids need the network the first time. What a user can mend is raised as UserError, a one-line message.
"""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from utils import UserError, progress_bar

import datasets
import torch
import transformers

from files import text_files

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"
READERS = {".jsonl": text_files.json_rows, ".json": text_files.json_rows, ".jsonl.gz": text_files.json_rows,
           ".json.gz": text_files.json_rows, ".parquet": text_files.parquet_rows, ".txt": text_files.paragraphs}
SUFFIXES = tuple(READERS)
C4_TRAIN = {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}
C4_VALIDATION = {"path": "allenai/c4", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                 "split": "validation"}
WIKITEXT2_TEST = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}


def documents(dataset: str) -> Iterator[str]:
    """Yield the documents of a dataset (see the top of this file) in file order, reading only as far as asked.

    Errors, once reading starts: UserError for no such path or hub id, no network, no text column, a malformed file.
    """
    with _explained(dataset):
        if not _is_local(dataset):
            yield from _texts(_load(**_hub_arguments(dataset), streaming=True), dataset)
        elif any(Path(dataset, mark).is_file() for mark in ("state.json", "dataset_dict.json")):  # save_to_disk's
            yield from _texts(text_files.saved_rows(Path(dataset)), dataset)
        else:
            for file in _files(dataset):
                kind = next(suffix for suffix in READERS if file.name.endswith(suffix))
                documents_or_rows = READERS[kind](file)
                yield from documents_or_rows if kind == ".txt" else _texts(documents_or_rows, str(file))


def minibatches(tokenizer: Tokenizer, dataset: str, dataset_size: int, batchsize: int, sqlen: int) -> torch.Tensor:
    """The fixed training minibatches ξ_b of MaskPro: int64 [dataset_size // batchsize, batchsize, sqlen].

    The first dataset_size documents, in file order, with more than sqlen tokens (special tokens included), cut to
    sqlen. Unshuffled and never padded; reading stops when enough were found. Same samples as the authors' scripts.

    Errors: UserError for sizes that do not fit together, too few documents long enough, and those of `documents`.
    """
    if dataset_size < 1:
        raise UserError(f"--dataset_size is {dataset_size}: it must be at least 1 document")
    if sqlen < 2:
        raise UserError(f"--sqlen is {sqlen}: it must be at least 2 tokens, one to predict the next from")
    if batchsize < 1 or dataset_size % batchsize:
        divisors = [size for size in range(1, dataset_size + 1) if dataset_size % size == 0]
        below, above = [d for d in divisors if d < batchsize], [d for d in divisors if d > batchsize]
        nearest = " or ".join(map(str, below[-1:] + above[:1]))
        raise UserError(f"--batchsize {batchsize} does not divide --dataset_size {dataset_size}: use {nearest}")
    samples, read = [], 0
    with progress_bar(total=dataset_size, desc="reading documents", leave=False) as bar:
        for text in documents(dataset):
            read += 1
            tokens = _tokens(tokenizer, text)
            if len(tokens) > sqlen:
                samples.append(tokens[:sqlen])
                bar.update()
            if len(samples) == dataset_size:
                break
    if len(samples) < dataset_size:
        raise UserError(f"only {len(samples)} of the {read} documents in {dataset} have more than {sqlen} tokens, "
                        f"--dataset_size asks for {dataset_size}: lower --dataset_size or --sqlen")
    return torch.stack(samples).view(-1, batchsize, sqlen)


def token_sequences(tokenizer: Tokenizer, dataset: str, tokens: int, batchsize: int, sqlen: int,
                    seed: int) -> torch.Tensor:
    """Minibatches of about so many tokens of running text, shuffled: int64 [minibatches, batchsize, sqlen].

    Documents are read in file order, joined with the end-of-text token if there is one, and cut into sequences without
    a remainder, so that no text is lost; reading stops when there are enough. A dataset of less gives what it has.
    Where the tokenizer puts a token before a text, a sequence is that token and sqlen - 1 of the running text, which
    has it nowhere else: it stands where it stands in use, in front.

    Errors: UserError for a dataset of less than one minibatch, and those of `documents`.
    """
    if sqlen < 2:
        raise UserError(f"--sqlen is {sqlen}: it must be at least 2 tokens, one to predict the next from")
    bos = added_bos(tokenizer)
    begin = 0 if bos is None else 1
    minibatch = batchsize * (sqlen - begin)  # tokens of the text in one
    wanted = max(1, tokens // (batchsize * sqlen)) * minibatch
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces, found = [], 0
    with progress_bar(total=wanted, desc="reading tokens", leave=False) as bar:
        for text in documents(dataset):
            pieces.append(torch.cat([_tokens(tokenizer, text)[begin:], torch.tensor(between, dtype=torch.int64)]))
            found += len(pieces[-1])
            bar.update(len(pieces[-1]))
            if found >= wanted:
                break
    minibatches = min(wanted, found) // minibatch
    if not minibatches:
        raise UserError(f"{dataset} has only {found} tokens, fewer than one minibatch of {batchsize} x {sqlen}: lower "
                        "--batchsize or --sqlen or use a longer text")
    sequences = torch.cat(pieces)[:minibatches * minibatch].view(-1, sqlen - begin)
    sequences = torch.nn.functional.pad(sequences, (begin, 0), value=bos)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return sequences[order].view(minibatches, batchsize, sqlen)


def calibration_samples(tokenizer: Tokenizer, dataset: str, nsamples: int, seqlen: int, seed: int,
                        bos: int | None = None) -> torch.Tensor:
    """Random crops of random documents to calibrate pruning on: int64 [nsamples, seqlen].

    `get_c4` of SparseGPT and Wanda: documents are drawn with replacement until one has more than seqlen tokens
    (special tokens included), then cropped at random. Draws the same samples as theirs from the same seed, so only a
    crop from the first token on begins as the tokenizer begins a text. With `bos` each begins with that token, and ends
    a token earlier; this is not their protocol, not even for Llama, and so never the default.

    Errors: UserError for sizes below 1, no document long enough, and those of `documents`.
    """
    if nsamples < 1 or seqlen < 1:
        raise UserError(f"--nsamples is {nsamples} and --seqlen {seqlen}: both must be at least 1")
    generator = random.Random(seed)  # the stream of random.seed(seed), without touching the global one
    texts = _indexable(dataset)
    samples, short = [], set()  # short: indices of documents known to be too short
    with progress_bar(total=nsamples, desc="drawing documents", leave=False) as bar:
        while len(samples) < nsamples:
            if len(short) == len(texts):
                raise UserError(f"none of the {len(texts)} documents in {dataset} has more than {seqlen} tokens: "
                                "lower --seqlen or use a dataset of longer documents")
            index = generator.randint(0, len(texts) - 1)
            if index in short:
                continue
            tokens = _tokens(tokenizer, texts[index] or "")
            if len(tokens) <= seqlen:
                short.add(index)
                continue
            start = generator.randint(0, len(tokens) - seqlen - 1)
            crop = tokens[start : start + seqlen]
            samples.append(crop if bos in (None, crop[0]) else torch.cat([crop.new_tensor([bos]), crop[:-1]]))
            bar.update()
    return torch.stack(samples)


def perplexity_windows(tokenizer: Tokenizer, dataset: str, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """Disjoint windows of one long text to measure perplexity on: int64 [windows, seqlen].

    The text is tokenised in one call, cut into windows of seqlen tokens, the remainder dropped; `limit` keeps the first
    so many windows. Protocol of SparseGPT, Wanda and MaskLLM:
        wikitext2      the raw test split of WikiText-2, its rows joined with two newlines
        c4             the first 1100 documents of the first validation shard, joined with spaces, cut to 256 windows
        file.txt       the file as it is
        others         the documents of the dataset joined with two newlines

    Errors: UserError for seqlen < 2, limit < 1, a text shorter than one window, and those of `documents`.
    """
    return windows_and_tokens(tokenizer, dataset, seqlen, limit)[0]


def windows_and_tokens(tokenizer: Tokenizer, dataset: str, seqlen: int,
                       limit: int | None = None) -> tuple[torch.Tensor, int]:
    """`perplexity_windows`, and the number of tokens that the whole text has, the remainder included."""
    if seqlen < 2 or (limit is not None and limit < 1):
        raise UserError(f"--seqlen is {seqlen} and the limit {limit}: needs at least 2 tokens and 1 window")
    with _explained(dataset):
        if dataset == "wikitext2":
            text = "\n\n".join(_texts(_load(**WIKITEXT2_TEST, streaming=True), dataset))
        elif dataset == "c4":
            text = " ".join(itertools.islice(_texts(_load(**C4_VALIDATION, streaming=True), dataset), 1100))
            limit = min(limit or 256, 256)
        elif Path(dataset).is_file() and dataset.endswith(".txt"):
            text = Path(dataset).read_bytes().decode("utf-8")
        else:
            text = "\n\n".join(documents(dataset))
    tokens = _tokens(tokenizer, text)
    windows = len(tokens) // seqlen
    if windows == 0:
        raise UserError(f"{dataset} has only {len(tokens)} tokens, fewer than one window of {seqlen}: "
                        "lower --seqlen or use a longer text")
    return tokens[: windows * seqlen].view(windows, seqlen)[:limit], len(tokens)


def added_bos(tokenizer: Tokenizer) -> int | None:
    """The beginning-of-text token that this tokenizer puts before a text, or None. What it does counts: some have such
    a token and put none."""
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None


def wanted_bos(tokenizer: Tokenizer) -> int:
    """For --bos: the beginning-of-text token, whether the tokenizer adds it or not. UserError where there is none."""
    if tokenizer.bos_token_id is None:
        raise UserError("--bos: the tokenizer of this model has no beginning-of-text token; leave out --bos")
    return tokenizer.bos_token_id


def fingerprint(batches: torch.Tensor) -> str:
    """16 hex digits that change with any token or the shape: sha256 over shape and little-endian int64 tokens."""
    tokens = batches.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(str(tuple(batches.shape)).encode() + tokens).hexdigest()[:16]


def _tokens(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """int64 [tokens], special tokens included, of any length: verbose=False drops the warning about long inputs."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)


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


def _load(path: str, **arguments):
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


def _texts(rows: Iterable[dict], dataset: str) -> Iterator[str]:
    """The text of each row, where a missing one counts as empty; of a question, a text for every choice."""
    column = None
    for row in rows:
        if "text" not in row and isinstance(row.get("context"), str) and isinstance(row.get("choices"), list):
            texts = [row["context"] + choice for choice in row["choices"]]
        else:
            column = column or _text_column(row, dataset)
            texts = [row.get(column) or ""]
        for text in texts:
            text.encode()  # half a surrogate pair, which JSON can spell, no tokenizer takes
            yield text


def _indexable(dataset: str):
    """All documents as a sequence: a hub dataset memory-mapped from the cache, a local one in memory."""
    if _is_local(dataset):
        texts = list(documents(dataset))
    else:
        with _explained(dataset):
            rows = _load(**_hub_arguments(dataset))
            texts = rows[_text_column(rows[0], dataset)] if len(rows) else []
    if len(texts) == 0:
        raise UserError(f"dataset {dataset} holds no documents")
    return texts


@contextmanager
def _explained(dataset: str):
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
