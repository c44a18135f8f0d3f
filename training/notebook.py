"""sparsify.py as a function of a loaded model, for notebooks."""

import data
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import layers_to_mask
from models.loading import Tokenizer, check_length
from models.loss import check_tokens
from pruning.one_shot import OneShot, one_shot_masks
from training import initialize, plan, preparation
from training.defaults import EVALUATIONS, GIVEN_SHARE, LOGITS, STEP_SIZE, STEPS
from training.loop import BAD_LOSSES
from training.straight_through import StraightThrough, soft_temperature, step_size
from training.validation import Validation
from utils import UserError, progress_bar

from torch import Tensor, nn


def sparsify(
    model: nn.Module,
    tokenizer: Tokenizer,
    dataset: str,
    sparsity_type: tuple[int, int] = (2, 4),
    steps: int = STEPS,
    batchsize: int = 8,
    seqlen: int = 128,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Learn a mask for a loaded causal LM, in its own dtype and on its device, with the defaults of
    sparsify.py. Returns the masks; the model is then frozen and sparse.

        masks = sparsify(model, tokenizer, "text.jsonl")  # layer name -> bool [out, in], on the CPU
        files.mask_files.save("mask.safetensors", masks, 2, 4)

    dataset: text in a file, a folder or a hub id; at most (steps + 4 %) * batchsize * seqlen tokens
    of it are read. Unlike the command, this generates no text, cannot resume, uses one process, and
    writes no table and no checkpoint. Raises UserError if no mask can be learned.
    """
    check_length(model, seqlen)
    budget = plan.of_steps(steps, batchsize * seqlen)
    text = data.token_sequences(tokenizer, [dataset], budget.tokens, batchsize, seqlen, seed)
    batches, selecting, _ = plan.split(text)
    check_tokens(model, batches)
    model.requires_grad_(False).eval()
    layers = layers_to_mask(model, None, sparsity_type[1])
    sequences = batches.flatten(0, 1)
    wanda = OneShot("wanda", sparsity_type)
    m0 = dict(one_shot_masks(model, layers, sequences[: preparation.SEQUENCES], wanda))
    masked = MaskedModel(model, m0, LinearSpace(*sparsity_type), LOGITS, seed=seed, keep_dense=True)
    learner = StraightThrough(masked, seqlen)
    validation = Validation(learner, selecting)
    validation.evaluate(0)
    read_by_swaps = preparation.read_by_swaps(sequences, budget.tokens)
    initialize.from_swaps(masked, LOGITS, read_by_swaps, budget.sweeps)
    skipped_in_a_row = 0
    for step in progress_bar(range(steps), desc="learning", unit="step"):
        size = step_size(STEP_SIZE, step / steps, steps)
        temperature = soft_temperature(step / steps)
        distill = [GIVEN_SHARE] * batchsize
        result = learner.step(batches[step % len(batches)], size, distill, temperature)
        skipped_in_a_row = 0 if result.is_finite else skipped_in_a_row + 1
        if skipped_in_a_row == BAD_LOSSES:
            raise UserError(f"{BAD_LOSSES} losses in a row are {result.loss}: load it as bfloat16")
        if EVALUATIONS * (step + 1) // steps > EVALUATIONS * step // steps:
            validation.evaluate(step + 1)
    return masked.finish(validation.bits)
