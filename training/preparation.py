"""The inputs of sparsify.py: text, channel order, m0."""

from collections.abc import Callable
from pathlib import Path

import data
from files import mask_files, permutation_files
from files.atomic import atomic_write
from files.documents import are_questions
from models import generation, processes
from models.layers import find_layers
from models.loading import Tokenizer, model_fingerprint
from pruning.channel_order import search_and_reorder
from pruning.channels import apply_permutation
from pruning.one_shot import OneShot, one_shot_masks

import torch
from torch import Tensor, nn

READ_BY_SWAPS = 0.4  # share of the planned text, at most, that swaps read
QUESTIONS_SHARE = 0.25  # share of the text, at most, that is questions
READINGS = 2  # times that each question may occur, to reach that share
SEQUENCES = 64  # sequences, at most, to measure inputs on for Wanda's mask and the channel order


def mixed(texts: list[tuple[Tensor, float]], seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle the sequences of several texts into minibatches, int64 `[minibatches, sequences,
    tokens]`, with each sequence's share of distillation, `[minibatches, sequences]`. texts: the
    minibatches of each text, and its share."""
    minibatches = torch.cat([text for text, _ in texts])
    distill = torch.cat(
        [torch.full(text.shape[:2], share, dtype=torch.float64) for text, share in texts]
    )
    if len(texts) == 1:  # it is in a random order already
        return minibatches, distill
    order = torch.randperm(distill.numel(), generator=torch.Generator().manual_seed(seed))
    mixed_minibatches = minibatches.flatten(0, 1)[order].view_as(minibatches)
    return mixed_minibatches, distill.flatten()[order].view_as(distill)


def given_texts(
    read: Callable[[list[str], int], Tensor], datasets: list[str], tokens: int, is_all: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Read questions, at most a quarter of `tokens`, and other text, up to the rest. Returns the
    minibatches of both, as lists of none or one.

    read: reads up to so many tokens of datasets, int64 `[minibatches, sequences, tokens]`; is_all:
    no text will be generated, so raise TooShortError for text of less than one minibatch instead of
    leaving it out.
    """

    def minibatches(datasets: list[str], tokens: int) -> list[Tensor]:
        try:
            return [read(datasets, tokens)] if datasets else []
        except data.TooShortError as error:
            if is_all:
                raise
            processes.log(
                f"note: {error}; the model generates text instead, which continues this text if "
                "it is given as --after, too"
            )
            return []

    with_questions = [dataset for dataset in datasets if are_questions(dataset)]
    questions = [
        at_most_a_quarter(text.repeat(READINGS, 1, 1), (1 - QUESTIONS_SHARE) * tokens)
        for text in minibatches(with_questions, tokens)
    ]
    remaining = tokens - sum(text.numel() for text in questions)
    others = [dataset for dataset in datasets if dataset not in with_questions]
    return questions, minibatches(others, remaining)


def read_by_swaps(sequences: Tensor, tokens: int) -> Tensor:
    """Return the part of int64 `[sequences, tokens]` that swaps read, if `tokens` tokens were
    planned."""
    return sequences[: max(1, int(READ_BY_SWAPS * tokens) // sequences.shape[1])]


def at_most_a_quarter(questions: Tensor, others: float) -> Tensor:
    """Return the first minibatches of questions, at most QUESTIONS_SHARE of the text together with
    `others` other tokens, but at least one; all if `others` is 0."""
    most = int(others * QUESTIONS_SHARE / (1 - QUESTIONS_SHARE)) // questions[0].numel()
    return questions[: max(1, most)] if others else questions


def generate_text(
    file: Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    tokens: int,
    seqlen: int,
    after: str | None,
    seed: int,
) -> None:
    """Generate about `tokens` tokens of documents into a file, unless it exists. Each document
    continues one of the passages of `after`, if given."""
    passages = generation.read_passages(after, model, tokenizer, seqlen) if after else None
    # a large batch takes little longer than a small one
    batchsize = min(256, max(16, tokens // seqlen))
    with processes.main_process_first():
        if processes.is_main() and not file.exists():
            generation.write_text(file, model, tokenizer, tokens, seqlen, batchsize, passages, seed)


def reorder_channels(
    file: Path,
    model: nn.Module,
    name: str,
    targets: list[str] | None,
    pattern: tuple[int, int],
    sequences: Tensor,
    seed: int,
) -> None:
    """Reorder the model's channels so that masks of this pattern keep more. The order is read from
    a file; if it does not exist, the main process searches for an order and writes it."""
    with processes.main_process_first():
        if not processes.is_main() or file.exists():
            apply_permutation(model, file)
            return
        original = model_fingerprint(model)
        orders, _ = search_and_reorder(
            model, find_layers(model, targets), sequences[:SEQUENCES], pattern, seed=seed
        )
        with atomic_write(file) as tmp:
            permutation_files.save(tmp, orders, name, original)


def wanda_mask(
    file: Path,
    model: nn.Module,
    name: str,
    targets: list[str] | None,
    pattern: tuple[int, int],
    sequences: Tensor,
) -> None:
    """Write Wanda's mask of the layers, unless the file exists. It is measured on the first
    SEQUENCES rows of int64 `[sequences, tokens]`."""
    layers = find_layers(model, targets)
    with processes.main_process_first():
        if processes.is_main() and not file.exists():
            masks = dict(
                one_shot_masks(model, layers, sequences[:SEQUENCES], OneShot("wanda", pattern))
            )
            mask_files.save(file, masks, *pattern, name, model_fingerprint(model))
