"""Where learning starts, if not from C * m0: logits at random, from the weights' scores, or from
swaps."""

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

MOST_LAYERS = 2**20  # between the random numbers of two seeds
SEQUENCES = 64  # of text that scores measure the layers' inputs on
TOKENS = 30_000  # of text, at most, that swaps measure them on


def random_logits(number: int, weights: int, space: Space, magnitude: float, seed: int) -> Tensor:
    """Where --init random starts: C times normal random numbers, float32 `[blocks, width]` on the
    CPU, for the layer of this number, which has so many weights."""
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
    """m0 of --init random: the most probable mask of random logits, of all layers or of those that
    the targets name."""
    masks = {}
    for number, (layer, module) in enumerate(layers_to_mask(model, targets, space.m).items()):
        shape = weight_matrix(module).shape
        masks[layer] = space.mode(
            random_logits(number, shape.numel(), space, magnitude, seed)
        ).view(shape)
    return MaskFile(masks, space.n, space.m, base_model(name), model_fingerprint(model))


def from_random(masked: MaskedModel, magnitude: float, seed: int) -> None:
    """The logits that `random_mask` is the most probable mask of."""
    for number, layer in enumerate(masked.layers.values()):
        logits = random_logits(number, layer.shape.numel(), masked.space, magnitude, seed)
        own = layer.rows.own(logits.view(layer.shape[0], -1)).reshape(-1, masked.space.width)
        layer.set_logits(lambda part, own=own: own[part])


def from_scores(masked: MaskedModel, magnitude: float, sequences: Tensor) -> None:
    """Logits follow Wanda's scores |w| ||x||, the norms measured in the dense model on the first
    SEQUENCES of int64 `[sequences, tokens]`: blocks whose scores are close are the least certain of
    m0."""
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
    """Logits of the layer's mask and of scores, `[out, in]`."""
    score = score.view(-1, layer.m)
    layer.set_logits(
        lambda part: masked.space.init(
            bits_to_mask(layer.bits[part], layer.m), magnitude, score[part]
        )
    )


def from_swaps(masked: MaskedModel, magnitude: float, sequences: Tensor, sweeps: int) -> None:
    """Masks improved by swaps; a logit is the larger, the more the best swap of its weight would
    cost (`swaps.confidence`).

    One pass of the sequences, int64 `[sequences, tokens]`, the first TOKENS tokens of them, through
    the decoder without its head; a layer is improved when the pass reaches it, so that it sees what
    the improved masks before it make of its inputs. One Hessian is kept at a time. sweeps: over the
    blocks, at most; of none, the logits follow Wanda's scores.
    """
    sequences = sequences[: math.ceil(TOKENS / sequences.shape[1])]
    shared = lru_cache(1)(hessian_of)

    def improve(name: str, inputs: Tensor) -> None:
        layer = masked.layers[name]
        if len(layer.bits) and not sweeps:
            norms = torch.linalg.vector_norm(inputs.flatten(0, -2), dim=0, dtype=torch.float32)
            _follow(
                masked, layer, magnitude, wanda(layer.weight.float(), norms.to(layer.weight.device))
            )
        elif len(layer.bits):
            hessian = shared(inputs).to(layer.weight.device)
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
    masked.broadcast_()  # GPUs may round these sums otherwise
