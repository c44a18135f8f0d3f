"""Masks and the layers of a model: matched, put on for good, checked."""

from pathlib import Path

from files import mask_files
from models import processes
from models.layers import find_layers, weight_matrix
from models.loading import model_fingerprint
from models.sharding import own_weight
from utils import UserError

from torch import Tensor, nn

SPARSE = 0.1  # share of zeros that a dense layer does not have


def match_masks(layers: dict[str, nn.Module], masks: dict[str, Tensor]) -> None:
    """UserError unless each mask has a layer of its shape."""
    for name, shape in mask_files.shapes_of(masks).items():
        here = [*weight_matrix(layers[name]).shape] if name in layers else "not"
        if [*shape] != here:
            raise UserError(
                f"the mask is of another model: {name} is {[*shape]} there and {here} here; give "
                "the --mask that get_mask.py made from this --model"
            )


def read_masks(
    path: str | Path, model: nn.Module, pattern: tuple[int, int] | None = None
) -> mask_files.MaskFile:
    """The mask file (of any format, or a run's) for this model, checked against its layers and its
    fingerprint.

    UserError for a file that is damaged, of another pattern than the wanted (N, M) (None: the
    file's own, or 2:4 where the format holds none), or of another model.
    """
    layers = find_layers(model)
    shapes = {name: tuple(weight_matrix(module).shape) for name, module in layers.items()}
    found = mask_files.load(path, pattern, shapes)
    match_masks(layers, found.masks)
    if found.fingerprint and found.fingerprint != model_fingerprint(model):
        raise UserError(
            f"{path} is of another model: it was made from "
            f"{found.model or 'one that it does not name'}, and the order of the channels or the "
            "input embeddings differ; give the --mask that get_mask.py made from this --model, or "
            "the permutation that the mask was made for"
        )
    return found


def learned_layers(
    model: nn.Module, found: mask_files.MaskFile, targets: list[str] | None
) -> list[str]:
    """Names of the layers whose masks are to be learned: of those with a mask, the ones that the
    targets name. UserError where there is none."""
    layers = find_layers(model, targets)
    learned = [name for name in found.masks if name in layers]
    if not learned:
        raise UserError(
            "the mask has none of the layers that --targets name; give the --mask of a model in "
            "which they are pruned"
        )
    return learned


def note_sparse(layers: dict[str, nn.Module]) -> None:
    """Say so where layers to be pruned have been pruned before."""
    zeros = [
        int((own_weight(module) == 0).sum()) / max(1, own_weight(module).numel())
        for module in layers.values()
    ]
    if max(zeros, default=0) > SPARSE:
        processes.log(
            f"note: {max(zeros):.0%} of the weights of a layer are zero already: is this the "
            "dense model?"
        )


def apply_masks(layers: dict[str, nn.Module], masks: dict[str, Tensor]) -> None:
    """Zero the pruned weights in place, to +0.0."""
    for name, mask in masks.items():
        weight = weight_matrix(layers[name])
        weight.masked_fill_(~mask.to(weight.device), 0.0)


def apply_mask(model: nn.Module, file: str | Path) -> nn.Module:
    """The model itself, its pruned weights zeroed in place (+0.0) by a mask file: of ours, or 2:4
    of another format.

    UserError for a file that is damaged or of another model (shapes, fingerprint).
    """
    apply_masks(find_layers(model), read_masks(file, model).masks)
    return model


def nonzero_mask(weight: Tensor, n: int, m: int) -> tuple[Tensor, int]:
    """Mask of the weights that are not zero, bool `[out, in]`, at most N of each M; how many blocks
    with fewer it fills up."""
    kept = (weight != 0).reshape(-1, m)
    counts = kept.sum(1)
    short = counts < n
    missing = (n - counts[short])[:, None]
    kept[short] |= ~kept[short] & ((~kept[short]).cumsum(1) <= missing)
    return kept.view(weight.shape), int(short.sum())


def check_sparsity(layers: dict[str, nn.Module], pattern: tuple[int, int] | None) -> float:
    """The share of weights of these layers that are not zero. With pattern (N, M), UserError naming
    the layers where a block of M keeps more than N."""
    broken = []
    kept = 0
    total = 0
    for name, module in layers.items():
        weight = weight_matrix(module)
        nonzero = weight != 0
        kept = kept + int(nonzero.sum())
        total = total + weight.numel()
        if pattern:
            crowded = int((nonzero.reshape(-1, pattern[1]).sum(1) > pattern[0]).sum())
            if crowded:
                broken.append(f"{name} ({crowded} blocks)")
    if broken:
        raise UserError(
            f"{len(broken)} of {len(layers)} layers are not {pattern[0]}:{pattern[1]} sparse, "
            f"{broken[0]} among them; check --sparsity_type, name the sparse layers with "
            "--targets, or prune them with prune.py"
        )
    return kept / total
