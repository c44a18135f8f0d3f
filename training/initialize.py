"""Initial logits other than C * m0: random, from the weights' scores, or from swaps."""

import math
from functools import lru_cache

from files.mask_files import MaskFile
from files.records import base_model
from masking.block_bits import bits_to_mask, mask_to_bits
from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from masking.spaces import Space
from models.layers import layers_to_mask, weight_matrix
from models.loading import model_fingerprint
from pruning import swaps
from pruning.calibration import for_each_layer, hessian_of, input_norms
from pruning.one_shot import wanda

import torch
from torch import Tensor, nn

MOST_LAYERS = 2**20  # more than a model has: layers of different seeds draw different numbers
SEQUENCES = 64  # sequences, at most, to measure the layers' inputs on for scores
TOKENS = 30_000  # tokens, at most, to measure them on for swaps


def random_logits(number: int, weights: int, space: Space, magnitude: float, seed: int) -> Tensor:
    """Return initial logits for --init random: `magnitude` (C) times normal random numbers, float32
    `[blocks, width]`, on the CPU, for layer `number`, which has `weights` weights."""
    generator = torch.Generator().manual_seed((seed * MOST_LAYERS + number) % 2**63)
    return magnitude * torch.randn(weights // space.m, space.width, generator=generator)


def random_mask(
    model: nn.Module,
    name: str,
    targets: list[str] | None,
    space: Space,
    magnitude: float,
    seed: int,
) -> MaskFile:
    """Return m0 for --init random: the most probable mask of random logits, for all layers or those
    that `targets` name."""
    masks = {}
    for number, (layer, module) in enumerate(layers_to_mask(model, targets, space.m).items()):
        shape = weight_matrix(module).shape
        masks[layer] = space.mode(
            random_logits(number, shape.numel(), space, magnitude, seed)
        ).view(shape)
    return MaskFile(masks, space.n, space.m, base_model(name), model_fingerprint(model))


def from_random(masked: MaskedModel, magnitude: float, seed: int) -> None:
    """Set the logits whose most probable mask is that of `random_mask`."""
    for number, layer in enumerate(masked.layers.values()):
        logits = random_logits(number, layer.shape.numel(), masked.space, magnitude, seed)
        rows = layer.rows.own(logits.view(layer.shape[0], -1)).reshape(-1, masked.space.width)
        layer.set_logits(lambda part, rows=rows: rows[part])


def from_scores(masked: MaskedModel, magnitude: float, sequences: Tensor) -> None:
    """Set logits that follow Wanda's scores |w| ||x||, so that blocks with close scores are the
    least certain of m0. The norms are measured in the dense model on the first SEQUENCES rows of
    int64 `[sequences, tokens]`."""
    modules = {name: layer.module for name, layer in masked.layers.items()}
    with masked.use_dense():
        norms = input_norms(masked.model, modules, sequences[:SEQUENCES])
    for name, layer in masked.layers.items():
        _follow(
            masked,
            layer,
            magnitude,
            wanda(layer.weight.float(), norms[name].to(layer.weight.device)),
        )


def _follow(masked: MaskedModel, layer: MaskedLayer, magnitude: float, score: Tensor) -> None:
    """Set the logits of a layer from its mask and from scores, `[out, in]`."""
    score = score.view(-1, layer.m)
    layer.set_logits(
        lambda part: masked.space.init(
            bits_to_mask(layer.bits[part], layer.m), magnitude, score[part]
        )
    )


def from_swaps(masked: MaskedModel, magnitude: float, sequences: Tensor, sweeps: int) -> None:
    """Improve the masks by swaps and set logits by the costs of swaps (`swaps.confidence`): the
    more the best swap of a weight would cost, the surer its place in the mask.

    The first TOKENS tokens of the sequences, int64 `[sequences, tokens]`, make one pass through the
    decoder without its head. A layer is improved when the pass reaches it, so it sees its inputs as
    the improved earlier layers produce them. One Hessian is kept at a time. sweeps: most sweeps
    over the blocks; with 0, the logits follow Wanda's scores.
    """
    sequences = sequences[: math.ceil(TOKENS / sequences.shape[1])]
    cached_hessian = lru_cache(1)(hessian_of)

    def improve(name: str, inputs: Tensor) -> None:
        layer = masked.layers[name]
        if len(layer.bits) and not sweeps:
            norms = torch.linalg.vector_norm(inputs.flatten(0, -2), dim=0, dtype=torch.float32)
            _follow(
                masked, layer, magnitude, wanda(layer.weight.float(), norms.to(layer.weight.device))
            )
        elif len(layer.bits):
            hessian = cached_hessian(inputs).to(layer.weight.device)
            mask = swaps.refine_by_swaps(
                layer.weight, layer.mask_of(layer.bits), hessian, layer.m, sweeps
            )
            layer.bits.copy_(mask_to_bits(mask.view(-1, layer.m)))
            _follow(
                masked, layer, magnitude, swaps.confidence(layer.weight, mask, hessian, layer.m)
            )
        masked.rewrite(layer)

    modules = {name: layer.module for name, layer in masked.layers.items()}
    for_each_layer(masked.model, modules, sequences, improve, "swapping")
    masked.broadcast_()  # the processes' GPUs may have rounded these sums differently
