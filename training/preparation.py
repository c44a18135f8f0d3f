"""What sparsify.py learns from: the text, the order of the channels, m0."""

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

READ_BY_SWAPS = 0.4  # of the planned text, at most
QUESTIONS_SHARE = 0.25  # of the text, at most
READINGS = 2  # of each question, to make that share
SEQUENCES = 64  # of text that Wanda and the order are measured on


def mixed(texts: list[tuple[Tensor, float]], seed: int) -> tuple[Tensor, Tensor]:
    """Minibatches of all sequences in one random order, int64 `[minibatches, sequences, tokens]`,
    and each sequence's share of distillation, `[minibatches, sequences]`; texts: the minibatches of
    each text, and its share."""
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
    """The minibatches of given questions, at most a quarter of so many tokens, and of other text up
    to as many: lists of none or one. read: up to so many tokens of datasets, int64 `[minibatches,
    sequences, tokens]`; is_all: no text will be generated in place of what is too short."""

    def minibatches(datasets: list[str], tokens: int) -> list[Tensor]:
        try:
            return [read(datasets, tokens)] if datasets else []
        except data.TooShortError as error:
            if is_all:
                raise
            processes.log(
                f"note: {error}; the model generates text in its place, and continues it if it is "
                "--after"
            )
            return []

    asking = [dataset for dataset in datasets if are_questions(dataset)]
    questions = [
        at_most_a_quarter(text.repeat(READINGS, 1, 1), (1 - QUESTIONS_SHARE) * tokens)
        for text in minibatches(asking, tokens)
    ]
    left = tokens - sum(text.numel() for text in questions)
    return questions, minibatches([dataset for dataset in datasets if dataset not in asking], left)


def read_by_swaps(sequences: Tensor, tokens: int) -> Tensor:
    """Those of the sequences, int64 `[sequences, tokens]`, that swaps read where so many tokens
    were planned."""
    return sequences[: max(1, int(READ_BY_SWAPS * tokens) // sequences.shape[1])]


def at_most_a_quarter(questions: Tensor, others: float) -> Tensor:
    """As many minibatches of questions as are QUESTIONS_SHARE of the text with so many other
    tokens, at least one; all where there are no others."""
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
    """Write so many tokens of generated documents, each of which continues one of the passages, if
    there are some, into a file, unless it is there."""
    passages = generation.read_passages(after, model, tokenizer, seqlen) if after else None
    # a large batch takes hardly longer than a small one
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
    """Bring the model's channels into an order in which masks of this pattern keep more: that of a
    file which, where it is not there yet, the main process writes."""
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
    """Write Wanda's mask of these layers, measured on the first SEQUENCES sequences, int64
    `[sequences, tokens]`, where it is not there yet."""
    layers = find_layers(model, targets)
    with processes.main_process_first():
        if processes.is_main() and not file.exists():
            masks = dict(
                one_shot_masks(model, layers, sequences[:SEQUENCES], OneShot("wanda", pattern))
            )
            mask_files.save(file, masks, *pattern, name, model_fingerprint(model))
