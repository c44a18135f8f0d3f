"""What sparsify.py learns from: how much text its budget needs, the text itself, the order of the channels, m0."""
import math
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

import data
from files import mask_files, permutation_files
from files.atomic import atomic_write
from files.documents import are_questions
from models import generation, processes
from models.layers import find_layers
from models.loading import Tokenizer, model_fingerprint
from models.loss import batch_loss
from pruning.channel_order import search_and_reorder
from pruning.channels import apply_permutation
from pruning.one_shot import OneShot, one_shot_masks
from utils import UserError

import torch
from torch import Tensor, nn

HELDOUT, MOST_HELDOUT = 0.02, 8  # share of the minibatches, and how many at most, to select the mask; as many to report
PARTS = 2  # that are held out
TEXT_SHARE, SWAPS_SHARE, LEARNING_SHARE = 0.3, 0.15, 0.6  # of the minutes: for text and swaps at most, learning about
FORWARDS = 6  # that a step of learning costs
READ_BY_SWAPS = 0.4  # of the planned text, at most
QUESTIONS_SHARE, READINGS = 0.25, 2  # of the text, questions at most; how often each is read to make it
MOST_GENERATED = 400_000  # tokens; beyond, another pass through the text does as well (docs/sparsify.md)
FEWEST = 8  # minibatches of text, however short the time
SEQUENCES = 64  # of text that Wanda and the order are measured on


def heldout_of(minibatches: int) -> int:
    """How many of the minibatches select the mask."""
    return min(MOST_HELDOUT, math.ceil(HELDOUT * minibatches))


def planned_tokens(model: nn.Module, minutes: float | None, steps: int | None, batchsize: int, seqlen: int,
                   microbatch: int) -> int:
    """Tokens of text for one pass in so many steps or, by the measured speed of a forward pass, in so many minutes."""
    if steps is None:
        batch = torch.zeros(batchsize, seqlen, dtype=torch.int64)
        forward = partial(batch_loss, model, batch, microbatch)
        # the first warms up, and another program may slow one down
        repeated = timeit.repeat(forward, timer=time.perf_counter, repeat=3, number=1)
        steps = LEARNING_SHARE * 60 * minutes / (FORWARDS * processes.agreed(min(repeated)))
        steps = max(FEWEST, math.ceil(steps))
    found = wanted = steps * processes.size()
    while found - PARTS * heldout_of(found) < wanted:
        found += 1
    return found * batchsize * seqlen


def mixed(texts: list[tuple[Tensor, float]], seed: int) -> tuple[Tensor, Tensor]:
    """Minibatches of all sequences in one random order, int64 `[minibatches, sequences, tokens]`, and each sequence's
    share of distillation, `[minibatches, sequences]`; texts: the minibatches of each text, and its share."""
    minibatches = torch.cat([text for text, _ in texts])
    distill = torch.cat([torch.full(text.shape[:2], share, dtype=torch.float64) for text, share in texts])
    if len(texts) == 1:  # it is in a random order already
        return minibatches, distill
    order = torch.randperm(distill.numel(), generator=torch.Generator().manual_seed(seed))
    return minibatches.flatten(0, 1)[order].view_as(minibatches), distill.flatten()[order].view_as(distill)


def split(minibatches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minibatches to learn from, those that select the mask, and those that only the final table uses. UserError where
    there are fewer than three."""
    heldout = heldout_of(len(minibatches))
    learned = len(minibatches) - PARTS * heldout
    if learned < 1:
        raise UserError(f"the text makes {len(minibatches)} minibatches and at least {PARTS + 1} are needed: give more "
                        "text, or lower --batchsize or --seqlen")
    return minibatches.split([learned, heldout, heldout])


def given_texts(read: Callable[[list[str], int], Tensor], datasets: list[str], tokens: int,
                is_all: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The minibatches of given questions, at most a quarter of so many tokens, and of other text up to as many: lists
    of none or one. read: up to so many tokens of datasets, int64 `[minibatches, sequences, tokens]`; is_all: no text
    will be generated in place of what is too short."""
    def minibatches(datasets: list[str], tokens: int) -> list[Tensor]:
        try:
            return [read(datasets, tokens)] if datasets else []
        except data.TooShortError as error:
            if is_all:
                raise
            processes.log(f"note: {error}; the model generates text in its place, and continues it if it is --after")
            return []
    asking = [dataset for dataset in datasets if are_questions(dataset)]
    questions = [at_most_a_quarter(text.repeat(READINGS, 1, 1), (1 - QUESTIONS_SHARE) * tokens)
                 for text in minibatches(asking, tokens)]
    left = tokens - sum(text.numel() for text in questions)
    return questions, minibatches([dataset for dataset in datasets if dataset not in asking], left)


def at_most_a_quarter(questions: Tensor, others: float) -> Tensor:
    """As many minibatches of questions as are QUESTIONS_SHARE of the text with so many other tokens, at least one; all
    where there are no others."""
    most = int(others * QUESTIONS_SHARE / (1 - QUESTIONS_SHARE)) // questions[0].numel()
    return questions[:max(1, most)] if others else questions


def to_generate(missing: int, minibatch: int) -> int:
    """How many of the missing tokens the model generates: whole minibatches, FEWEST of them however large they are."""
    return min(missing, max(MOST_GENERATED, FEWEST * minibatch)) // minibatch * minibatch


def generate_text(file: Path, model: nn.Module, tokenizer: Tokenizer, tokens: int, seqlen: int, after: str | None,
                  seed: int, max_s: float, minibatch: int) -> None:
    """Write so many tokens of generated documents, each of which continues one of the passages, if there are some, into
    a file, where it is not there yet. After max_s seconds generation ends, but not before there are FEWEST minibatches
    of `minibatch` tokens."""
    passages = generation.read_passages(after, model, tokenizer, seqlen) if after else None
    batchsize = min(256, max(16, tokens // seqlen))  # a large batch takes hardly longer than a small one
    with processes.main_before_others():
        if processes.is_main() and not file.exists():
            generation.write_text(file, model, tokenizer, tokens, seqlen, batchsize, passages, seed, max_s,
                                  min(tokens, FEWEST * minibatch))


def reorder_channels(file: Path, model: nn.Module, name: str, targets: list[str] | None, pattern: tuple[int, int],
                     sequences: Tensor, seed: int) -> None:
    """Bring the model's channels into an order in which masks of this pattern keep more: that of a file which, where
    it is not there yet, the main process writes."""
    with processes.main_before_others():
        if not processes.is_main() or file.exists():
            apply_permutation(model, file)
            return
        original = model_fingerprint(model)
        orders, _ = search_and_reorder(model, find_layers(model, targets), sequences[:SEQUENCES], pattern, seed=seed)
        with atomic_write(file) as beside:
            permutation_files.save(beside, orders, name, original)


def wanda_mask(file: Path, model: nn.Module, name: str, targets: list[str] | None, pattern: tuple[int, int],
               sequences: Tensor) -> None:
    """Write Wanda's mask of these layers, measured on the first SEQUENCES sequences, int64 `[sequences, tokens]`, where
    it is not there yet."""
    layers = find_layers(model, targets)
    with processes.main_before_others():
        if processes.is_main() and not file.exists():
            masks = dict(one_shot_masks(model, layers, sequences[:SEQUENCES], OneShot("wanda", pattern)))
            mask_files.save(file, masks, *pattern, name, model_fingerprint(model))
