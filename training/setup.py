"""From flags to what the loop needs: model, m0, minibatches and baseline read, the model masked, its logits set."""
import math
import time
from dataclasses import dataclass

from utils import DTYPES, UserError

from torch import Tensor, nn

import data
import pge
from files import mask_files
from masking.layers import read_masks
from masking.masked_model import MaskedModel
from masking.spaces import SPACES
from models.layers import check_divisible, find_layers
from models.loading import check_length, load_model, model_fingerprint
from models.loss import batch_loss
from models.processes import ProcessGroup
from models.sharded_files import load_sharded
from models.sharding import REDUCES_UNUSED
from training import baselines, initialize
from training.progress import Run
from training.run_folder import RunFolder
from training.validation import Validation


@dataclass
class Inputs:
    """What a run reads. batches: all minibatches, int64 `[minibatches, sequences, tokens]`; learned: names of the
    layers whose masks are learned; baseline_losses: f(m0 * w, minibatch), where the cached baseline is wanted."""
    model: nn.Module
    tokenizer: object
    mask_file: mask_files.MaskFile | None
    learned: list[str]
    batches: Tensor
    fingerprints: dict[str, str]
    needs_baseline: bool
    baseline_losses: list[float] | None = None

    def split(self, val_fraction: float) -> tuple[Tensor, Tensor]:
        """Minibatches to learn from, and the last ones, held out."""
        heldout = math.ceil(val_fraction * len(self.batches))
        if heldout == len(self.batches):
            raise UserError(f"--val_fraction {val_fraction} of {len(self.batches)} minibatches leaves none to learn "
                            "from")
        return self.batches[:len(self.batches) - heldout], self.batches[len(self.batches) - heldout:]


def read_inputs(folder: RunFolder, group: ProcessGroup, *, model: str, dtype: str, device: str | None,
                device_map: str | None, trust_remote_code: bool, mask: str, sparsity_type: tuple[int, int],
                targets: list[str] | None, dataset: str, dataset_size: int, tokens: int | None, batchsize: int,
                sqlen: int, seed: int, estimator: str, baseline: str, baseline_file: str | None,
                shard: bool) -> Inputs:
    """Load the model, m0, the minibatches and the cached baseline, each checked; the folder records what was read."""
    sharded = shard and group.size > 1
    loaded, tokenizer = (load_sharded(model, dtype, group, trust_remote_code) if sharded else
                         load_model(model, dtype, device, device_map, trust_remote_code))
    check_length(loaded, sqlen, "--sqlen")
    mask_file = read_masks(mask, loaded, *sparsity_type)
    layers = find_layers(loaded, targets or [""])
    check_divisible(layers, sparsity_type[1])
    learned = [name for name in mask_file.masks if name in layers]
    if not learned:
        raise UserError(f"{mask} has no mask for the layers that --targets name")
    by_gradients = estimator == "straight_through"
    if (group.size > 1 and by_gradients and not (sharded and REDUCES_UNUSED)
            and any("expert" in name for name in learned)):
        raise UserError("experts that one process's text does not reach would keep the other processes waiting: use "
                        "--shard with torch 2.13, name other layers with --targets, or start one process")
    if tokens:
        batches = data.token_sequences(tokenizer, dataset, tokens, batchsize, sqlen, seed)
    else:
        batches = data.minibatches(tokenizer, dataset, dataset_size, batchsize, sqlen)
    fingerprints = {"model": model_fingerprint(loaded), "mask": mask_files.fingerprint(mask_file.masks),
                    "text": data.fingerprint(batches)}
    folder.check_inputs(fingerprints)
    needs_baseline = not by_gradients and pge.make_estimator(estimator).needs_baseline
    losses = None
    if needs_baseline and baseline == "cached":  # of all minibatches, before some are held out
        losses = baselines.load(baseline_file or baselines.default_path(dataset_size, batchsize, sqlen),
                                baselines.conditions(loaded, mask_file.masks, batches, dataset))
    return Inputs(loaded, tokenizer, mask_file, learned, batches, fingerprints, needs_baseline, losses)


def mask_model(inputs: Inputs, batches: Tensor, group: ProcessGroup, *, sparsity_type: tuple[int, int], space: str,
               logits: float, init: str, logits_dtype: str, seed: int, step: str, distill: float,
               is_restored: bool) -> MaskedModel:
    """The model under masks that are learned, its logits as --init wants them; swaps come later, in `start`.

    is_restored: a saved state will replace the logits, so that nothing is measured for them.
    """
    masks, norms = inputs.mask_file.masks, None
    if init == "scores" and not is_restored:  # in the dense model
        norms = initialize.wanda_norms(inputs.model, inputs.learned, batches)
    masked = MaskedModel(inputs.model, masks, SPACES[space](*sparsity_type), logits, DTYPES[logits_dtype],
                         inputs.learned, seed, step, keep_dense=distill > 0)
    if masked.is_sharded:  # FSDP wants its first pass to be of the whole model
        batch_loss(inputs.model, batches[0, :1, :2])
    if norms is not None:
        initialize.init_from_scores(masked, norms, logits)
    if init == "random":
        initialize.init_at_random(masked, logits, seed)
    if inputs.needs_baseline and inputs.baseline_losses is None:
        masked.keep_initial(masks)
    inputs.mask_file = inputs.mask_file if group.is_main else None  # which needs m0 again at the end
    return masked


def make_baseline(inputs: Inputs, masked: MaskedModel, microbatch: int) -> baselines.Baseline:
    """f(m0 * w, minibatch), cached or by a second forward; None where the estimator needs none."""
    if not inputs.needs_baseline:
        return baselines.no_baseline
    if inputs.baseline_losses is None:
        return baselines.online_baseline(masked, microbatch)
    return baselines.cached_baseline(inputs.baseline_losses)


def start(run: Run, masked: MaskedModel, validation: Validation, batches: Tensor, group: ProcessGroup, init: str,
          logits: float) -> None:
    """What a run that goes on has behind it: the held-out loss of m0 and then, with --init swaps, better masks."""
    if validation.has_text and validation.evaluate(0) is None:
        raise UserError(f"the held-out loss of m0 is not finite; use --dtype bfloat16 if the model overflows in "
                        f"{masked.model.dtype}")
    if init == "swaps":
        began = time.monotonic()
        initialize.init_from_swaps(masked, batches.flatten(0, 1), logits)
        group.check_same(masked.checksum(), "the logits at the start")
        run.position.seconds_swapping = time.monotonic() - began
