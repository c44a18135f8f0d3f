"""Masks and the layers of a model: matching, applying for good, checking."""

from pathlib import Path

from files import mask_files
from models import processes
from models.layers import find_layers, weight_matrix
from models.loading import model_fingerprint
from models.sharding import own_weight
from utils import UserError

from torch import Tensor, nn

SPARSE = 0.1  # share of zeros above which a layer counts as pruned


def match_masks(layers: dict[str, nn.Module], masks: dict[str, Tensor]) -> None:
    """Raise UserError unless each mask has a layer of its shape."""
    for name, shape in mask_files.shapes_of(masks).items():
        layer_shape = [*weight_matrix(layers[name]).shape] if name in layers else "missing"
        if [*shape] != layer_shape:
            raise UserError(
                f"the mask is of another model: {name} is {[*shape]} in the mask and {layer_shape} "
                "in the model; give the --mask that get_mask.py made from this --model"
            )


def read_masks(
    path: str | Path, model: nn.Module, pattern: tuple[int, int] | None = None
) -> mask_files.MaskFile:
    """Read a mask file of any format, or a run's, and check it against the model's layers and
    fingerprint.

    pattern: the wanted (N, M); None: the file's own, or 2:4 if the format holds none. Raises
    UserError if the file is damaged, or of another pattern or model.
    """
    layers = find_layers(model)
    shapes = {name: tuple(weight_matrix(module).shape) for name, module in layers.items()}
    mask_file = mask_files.load(path, pattern, shapes)
    match_masks(layers, mask_file.masks)
    if mask_file.fingerprint and mask_file.fingerprint != model_fingerprint(model):
        raise UserError(
            f"{path} is of another model: it was made from "
            f"{mask_file.model or 'one that it does not name'}, and the order of the channels or "
            "the input embeddings differ; give the --mask that get_mask.py made from this --model, "
            "or apply the permutation that the mask was made for"
        )
    return mask_file


def learned_layers(
    model: nn.Module, mask_file: mask_files.MaskFile, targets: list[str] | None
) -> list[str]:
    """Return the names of the layers whose masks are learned: those with a mask that the targets
    name. Raises UserError if there are none."""
    layers = find_layers(model, targets)
    learned = [name for name in mask_file.masks if name in layers]
    if not learned:
        raise UserError(
            "the mask has none of the layers that --targets name; give the --mask of a model in "
            "which they are pruned"
        )
    return learned


def note_sparse(layers: dict[str, nn.Module]) -> None:
    """Log a note if one of these layers, which are to be pruned, is sparse already."""
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
    """Set the pruned weights to +0.0, in place."""
    for name, mask in masks.items():
        weight = weight_matrix(layers[name])
        weight.masked_fill_(~mask.to(weight.device), 0.0)


def apply_mask(model: nn.Module, file: str | Path) -> nn.Module:
    """Set the pruned weights of a model to +0.0, in place, and return the model. file: a mask file
    of this project, or a 2:4 mask in another format.

    Raises UserError if the file is damaged or of another model (shapes, fingerprint).
    """
    apply_masks(find_layers(model), read_masks(file, model).masks)
    return model


def nonzero_mask(weight: Tensor, n: int, m: int) -> tuple[Tensor, int]:
    """Return the mask of the weights that are not zero, bool `[out, in]`, and how many blocks it
    fills up. The weight has at most N nonzero weights per block of M; a block with fewer is filled
    up to N with its first zeros."""
    return mask_files.fill(weight != 0, n, m)


def check_sparsity(layers: dict[str, nn.Module], pattern: tuple[int, int] | None) -> float:
    """Return the share of these layers' weights that are not zero. With pattern (N, M), raises
    UserError if blocks of M keep more than N; it names the first such layer."""
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
