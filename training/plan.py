"""Turn a budget into a plan: steps, text and swaps. Minutes become steps here, once; no run looks
at a clock afterwards."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from models import generation, processes
from models.layers import find_layers, weight_matrix
from models.loading import Tokenizer, input_device
from models.loss import batch_loss
from pruning.one_shot import largest
from pruning.swaps import refine_by_swaps
from training.straight_through import enable_checkpointing
from utils import UserError

import torch
from torch import Tensor, nn

HELDOUT = 0.02  # share of the minibatches that select the mask; as many are for the table
MOST_HELDOUT = 8  # minibatches that select the mask, at most
PARTS = 2  # held-out parts: one selects the mask, one is for the table
# tokens; with more, another pass through the text serves as well (docs/sparsify.md)
MOST_GENERATED = 400_000
FEWEST = 8  # minibatches of text to generate, however short the time
# over the blocks; three more sweeps gain a hundredth of what these do, in the same time
SWEEPS = 3
TEXT_SHARE = 0.3  # of the minutes, at most, for generating text
SWAPS_SHARE = 0.15  # of the minutes, at most, for swaps
# time of a step beyond forward and backward, in forward passes: teacher, weight gradients, update
# of the masks, evaluations
STEP_FORWARDS = 2.6
FIXED_S = 30  # for compiling
DOCUMENTS = 128  # generated at a time to measure the speed
GENERATED = 8  # tokens per such document
SLOWER = 1.3  # time per token of a whole document, relative to these first tokens


@dataclass
class Plan:
    """What a run does with its budget."""

    steps: int  # of learning
    tokens: int  # of text, held-out parts included: one pass in these steps
    generated: int  # tokens of text that the model generates, at most
    sweeps: int = SWEEPS  # of swaps over the blocks


def heldout_of(minibatches: int) -> int:
    """Return the number of minibatches that select the mask."""
    return min(MOST_HELDOUT, math.ceil(HELDOUT * minibatches))


def split(minibatches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split minibatches into those to learn from, those that select the mask, and those that only
    the final table uses. Raises UserError if there are fewer than three."""
    heldout = heldout_of(len(minibatches))
    learned = len(minibatches) - PARTS * heldout
    if learned < 1:
        raise UserError(
            f"the text makes {len(minibatches)} minibatches, but at least {PARTS + 1} are needed: "
            "give more text, or lower --batchsize or --seqlen"
        )
    return minibatches.split([learned, heldout, heldout])


def of_steps(steps: int, minibatch: int) -> Plan:
    """Return the plan for a number of steps with minibatches of `minibatch` tokens."""
    learned = steps * processes.world_size()
    minibatches = learned
    while minibatches - PARTS * heldout_of(minibatches) < learned:
        minibatches += 1
    return Plan(steps, minibatches * minibatch, max(MOST_GENERATED, FEWEST * minibatch))


def of_minutes(minutes: float, seconds: dict[str, float], minibatch: int) -> Plan:
    """Return the plan for a number of minutes, given the `seconds` that `measured` returns."""
    remaining_s = 60 * minutes - FIXED_S
    sweeps = max(0, min(SWEEPS, int(SWAPS_SHARE * remaining_s / seconds["sweep"])))
    remaining_s -= sweeps * seconds["sweep"]
    most_text_s = min(TEXT_SHARE * remaining_s, MOST_GENERATED * seconds["token"])
    text_s = minibatch * seconds["token"]  # seconds of text per step
    steps = max(
        remaining_s / (seconds["step"] + text_s), (remaining_s - most_text_s) / seconds["step"]
    )
    plan = of_steps(max(1, int(steps)), minibatch)
    plan.sweeps = sweeps
    plan.generated = max(
        FEWEST * minibatch, min(plan.generated, int(most_text_s / seconds["token"]))
    )
    return plan


def in_words(plan: Plan, seconds: dict[str, float]) -> str:
    """Say how many minutes a plan will take, in all and by part."""
    parts = [
        min(plan.tokens, plan.generated) * seconds["token"],
        plan.sweeps * seconds["sweep"],
        plan.steps * seconds["step"],
    ]
    text, swaps, learning = (f"{part / 60:.1f}" for part in parts)
    total = f"{(sum(parts) + FIXED_S) / 60:.1f}"
    return (
        f"about {total} minutes: {text} for text, {swaps} for swaps, {learning} for {plan.steps} "
        "steps"
    )


def measured(
    model: nn.Module,
    pattern: tuple[int, int],
    batchsize: int,
    seqlen: int,
    microbatch: int,
    checkpointing: bool,
) -> dict[str, float]:
    """Measure the seconds of a learning step and of a sweep of swaps over all blocks on this model;
    the same in all processes. The seconds per generated token are set to almost 0 (see
    `token_s`).

    microbatch, checkpointing: those of the run; without them the measurement could need more memory
    than the run does."""
    batch = torch.zeros(min(microbatch, batchsize), seqlen, dtype=torch.int64)
    undo = enable_checkpointing(model) if checkpointing else None
    try:
        batch_s = timed(lambda: forward_and_backward(model, batch))
    finally:
        if undo:
            undo()
    batch_s += STEP_FORWARDS * timed(lambda: batch_loss(model, batch, microbatch))
    seconds = {
        "step": batch_s * batchsize / len(batch),
        "sweep": sweep_s(model, pattern),
        "token": 1e-9,
    }
    return {name: processes.broadcast_float(value) for name, value in seconds.items()}


def token_s(model: nn.Module, tokenizer: Tokenizer) -> float:
    """Measure the seconds per token that the model generates."""
    seconds = timed(lambda: generation.generate(model, tokenizer, DOCUMENTS, GENERATED))
    return processes.broadcast_float(SLOWER * seconds / (DOCUMENTS * GENERATED))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes: the shortest of three, as the first warms up and
    another program may slow one down."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def forward_and_backward(model: nn.Module, batch: Tensor) -> None:
    """Run the frozen model forward and backward, down to its embeddings."""
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output.requires_grad_()
    )
    try:
        with torch.enable_grad():
            model(input_ids=batch.to(input_device(model)), use_cache=False).logits.sum().backward()
    finally:
        hook.remove()


def sweep_s(model: nn.Module, pattern: tuple[int, int]) -> float:
    """Return the seconds of a sweep over all blocks, extrapolated from the first layer: a layer's
    time grows as its rows times in^2."""
    weights = [weight_matrix(module) for module in find_layers(model).values()]
    first = weights[0]
    mask = largest(first.float().abs(), *pattern)
    hessian = torch.eye(first.shape[1], device=first.device)
    costs = [weight.numel() * weight.shape[1] for weight in weights]
    return (
        timed(lambda: refine_by_swaps(first, mask, hessian, pattern[1], 1)) * sum(costs) / costs[0]
    )
