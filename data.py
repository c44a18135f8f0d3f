"""Turn text into tokens: training minibatches, calibration samples and perplexity windows.

Every function takes a Hugging Face tokenizer and a dataset (a file, a folder or a hub id), whose
documents files/documents.py reads. Mistakes that the user can correct raise UserError with a
one-line message.
"""

import hashlib
import itertools
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from files.documents import documents, hub_texts
from utils import UserError, as_user_error, progress_bar

import torch
import transformers

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"
C4_VALIDATION = {
    "path": "allenai/c4",
    "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    "split": "validation",
}
WIKITEXT2_TEST = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}
MOST_DOCUMENTS = 400_000  # documents kept in memory to draw from; C4's shard has 356,317


class TooShortError(UserError):
    """Raised for a text that is shorter than one minibatch."""


def minibatches(
    tokenizer: Tokenizer, dataset: str, dataset_size: int, batchsize: int, seqlen: int
) -> torch.Tensor:
    """Return the fixed training minibatches ξ_b of MaskPro: int64 [dataset_size // batchsize,
    batchsize, seqlen].

    They are the first dataset_size documents, in file order, with more than seqlen tokens (special
    tokens included), cut to seqlen. They are not shuffled and never padded; reading stops when
    there are enough. These are the samples of the authors' scripts.

    Raises UserError if batchsize does not divide dataset_size or too few documents are long enough,
    and the errors of `documents`.
    """
    if dataset_size % batchsize:
        raise UserError(
            f"--batchsize {batchsize} does not divide --dataset_size {dataset_size}: change one "
            "of them"
        )
    samples = []
    read = 0
    with progress_bar(total=dataset_size, desc="reading documents", leave=False) as bar:
        for text in documents(dataset):
            read += 1
            tokens = _tokens(tokenizer, text)
            if len(tokens) > seqlen:
                samples.append(tokens[:seqlen])
                bar.update()
            if len(samples) == dataset_size:
                break
    if len(samples) < dataset_size:
        raise UserError(
            f"only {len(samples)} of the {read} documents in {dataset} have more than {seqlen} "
            f"tokens, but --dataset_size asks for {dataset_size}: lower --dataset_size or "
            "--seqlen; in a .txt file, blank lines separate documents"
        )
    return torch.stack(samples).view(-1, batchsize, seqlen)


def token_sequences(
    tokenizer: Tokenizer,
    datasets: Sequence[str],
    tokens: int,
    batchsize: int,
    seqlen: int,
    seed: int,
) -> torch.Tensor:
    """Return shuffled minibatches of about `tokens` tokens of running text: int64 [minibatches,
    batchsize, seqlen].

    Documents are read in file order, each time from the dataset that has given the fewest tokens so
    far, until there are enough tokens. They are joined with the end-of-text token, if there is one,
    and cut into sequences across documents, so only the end of the text that fills no minibatch is
    lost. Each sequence starts with BOS if the tokenizer adds one; the remaining seqlen - 1 tokens
    are running text, without BOS.

    Raises TooShortError if there is less than one minibatch, and the errors of `documents`.
    """
    bos = added_bos(tokenizer)
    bos_count = 0 if bos is None else 1
    minibatch = batchsize * (seqlen - bos_count)  # tokens of running text per minibatch
    wanted = max(1, tokens // (batchsize * seqlen)) * minibatch
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    unread = {index: documents(dataset) for index, dataset in enumerate(datasets)}
    tokens_read = dict.fromkeys(unread, 0)  # by dataset
    with progress_bar(total=wanted, desc="reading tokens", leave=False) as bar:
        while unread and sum(tokens_read.values()) < wanted:
            index = min(unread, key=tokens_read.get)
            text = next(unread[index], None)
            if text is None:
                del unread[index]
                continue
            if not text.strip():  # skip blank rows
                continue
            pieces.append(
                torch.tensor(encode(tokenizer, text)[bos_count:] + separator, dtype=torch.int64)
            )
            tokens_read[index] += len(pieces[-1])
            bar.update(len(pieces[-1]))
    total = sum(tokens_read.values())
    minibatches = min(wanted, total) // minibatch
    if not minibatches:
        raise TooShortError(
            f"{', '.join(datasets)} has only {total} tokens, fewer than one minibatch of "
            f"{batchsize} x {seqlen}: lower --batchsize or --seqlen, or use a longer text"
        )
    sequences = torch.cat(pieces)[: minibatches * minibatch].view(-1, seqlen - bos_count)
    sequences = torch.nn.functional.pad(sequences, (bos_count, 0), value=bos)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return sequences[order].view(minibatches, batchsize, seqlen)


def calibration_samples(
    tokenizer: Tokenizer,
    dataset: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
) -> torch.Tensor:
    """Return random crops of random documents to calibrate pruning on: int64 [nsamples, seqlen].

    This is `get_c4` of SparseGPT and Wanda: documents are drawn with replacement until one has more
    than seqlen tokens (special tokens included), which is then cropped at random. The same seed
    gives the same samples as theirs, so a crop has BOS only if it starts at a document's first
    token. Only the first MOST_DOCUMENTS documents of a dataset are drawn from.

    bos: a token that each sample is to begin with, ending one token earlier. This is not their
    protocol, not even for Llama, so it is never the default.

    Raises UserError if no document is long enough, and the errors of `documents`.
    """
    # the numbers of random.seed(seed), without touching the global generator
    generator = random.Random(seed)
    texts = list(itertools.islice(documents(dataset), MOST_DOCUMENTS))
    # cached, as documents of a small dataset are drawn often
    tokens_of = lru_cache(128)(lambda index: _tokens(tokenizer, texts[index]))
    samples = []
    too_short = set()  # indices of documents known to be too short
    with progress_bar(total=nsamples, desc="drawing documents", leave=False) as bar:
        while len(samples) < nsamples:
            if len(too_short) == len(texts):
                raise UserError(
                    f"none of the {len(texts)} documents in {dataset} has more than {seqlen} "
                    "tokens: lower --seqlen or use a dataset of longer documents"
                )
            index = generator.randint(0, len(texts) - 1)
            if index in too_short:
                continue
            tokens = tokens_of(index)
            if len(tokens) <= seqlen:
                too_short.add(index)
                continue
            start = generator.randint(0, len(tokens) - seqlen - 1)
            crop = tokens[start : start + seqlen]
            samples.append(
                crop if bos in (None, crop[0]) else torch.cat([crop.new_tensor([bos]), crop[:-1]])
            )
            bar.update()
    return torch.stack(samples)


def perplexity_windows(
    tokenizer: Tokenizer, dataset: str, seqlen: int, limit: int | None = None
) -> tuple[torch.Tensor, int]:
    """Return disjoint windows of one long text to measure perplexity on, int64 [windows, seqlen],
    and the number of tokens in the whole text, the remainder included.

    The text is tokenised in one call and cut into windows of seqlen tokens; the remainder is
    dropped. `limit` keeps the first windows only. Protocol of SparseGPT, Wanda and MaskLLM:

        wikitext2      the raw test split of WikiText-2, its rows joined with two newlines
        c4             the first 1100 documents of the first validation shard, joined with spaces,
                       cut to 256 windows
        file.txt       the file as it is
        others         the documents of the dataset joined with two newlines

    Raises UserError if the text is shorter than one window, and the errors of `documents`.
    """
    if dataset == "wikitext2":
        text = "\n\n".join(hub_texts(dataset, **WIKITEXT2_TEST))
    elif dataset == "c4":
        text = " ".join(itertools.islice(hub_texts(dataset, **C4_VALIDATION), 1100))
        limit = min(limit or 256, 256)
    elif Path(dataset).is_file() and dataset.endswith(".txt"):
        with as_user_error(f"dataset {dataset}", "check that the file is intact"):
            text = Path(dataset).read_bytes().decode("utf-8-sig")
    else:
        text = "\n\n".join(documents(dataset))
    tokens = _tokens(tokenizer, text)
    windows = len(tokens) // seqlen
    if windows == 0:
        raise UserError(
            f"{dataset} has only {len(tokens)} tokens, fewer than one window of {seqlen}: lower "
            "--seqlen or use a longer text"
        )
    return tokens[: windows * seqlen].view(windows, seqlen)[:limit], len(tokens)


def added_bos(tokenizer: Tokenizer) -> int | None:
    """Return the beginning-of-text token if this tokenizer puts it before a text, else None: some
    tokenizers have such a token and do not add it."""
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text of any length, to be continued: without the end-of-text token
    that some tokenizers append."""
    return without_end(tokenizer, tokenizer(text, verbose=False).input_ids)


def without_end(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Remove the end-of-text token from a text's tokens, if this tokenizer appends one to every
    text."""
    is_ended = tokens[-1:] == [tokenizer.eos_token_id] == tokenizer("a").input_ids[-1:]
    return tokens[:-1] if is_ended else tokens


def wanted_bos(tokenizer: Tokenizer) -> int:
    """Return the beginning-of-text token for --bos, whether or not the tokenizer adds it. Raises
    UserError if there is none."""
    if tokenizer.bos_token_id is None:
        raise UserError(
            "--bos: the tokenizer of this model has no beginning-of-text token; leave out --bos"
        )
    return tokenizer.bos_token_id


def fingerprint(batches: torch.Tensor) -> str:
    """Return 16 hex digits that identify tokens and shape: sha256 over the shape and the
    little-endian int64 tokens."""
    tokens = batches.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(str(tuple(batches.shape)).encode() + tokens).hexdigest()[:16]


def _tokens(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return int64 [tokens] of a text of any length, special tokens included; verbose=False drops
    the warning about long inputs."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
