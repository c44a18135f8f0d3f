"""Where learning starts: logits from m0, from the weights' scores, from swaps, or at random."""
import torch
from torch import Tensor, nn

from masking.block_bits import bits_to_mask, mask_to_bits
from masking.exact_kernels import CHUNK
from masking.masked_model import MaskedModel
from models.layers import find_layers
from pruning import swaps
from pruning.calibration import Hessians, input_norms, visit_in_order
from pruning.one_shot import wanda

SEQUENCES = 64  # of text that scores measure the layers' inputs on
TOKENS = 30_000  # of text, at most, that swaps measure them on


def wanda_norms(model: nn.Module, names: list[str], batches: Tensor) -> dict[str, Tensor]:
    """||x_j|| of the inputs of these layers in the dense model, on the first SEQUENCES sequences; layer name -> float32
    `[in]`. batches: int64 `[minibatches, sequences, tokens]`."""
    layers = find_layers(model, [""])
    return input_norms(model, {name: layers[name] for name in names}, batches.flatten(0, 1)[:SEQUENCES])


def init_from_scores(masked: MaskedModel, norms: dict[str, Tensor], magnitude: float) -> None:
    """Logits as confident of m0 as Wanda's scores |w| ||x|| are: close calls are the least certain."""
    for name, layer in masked.layers.items():
        score = wanda(layer.weight.float(), norms[name].to(layer.weight.device)).view(-1, layer.m)
        layer.set_logits(lambda part, layer=layer, score=score: masked.space.init(
            bits_to_mask(layer.bits[part], layer.m), magnitude, score[part]))


def init_at_random(masked: MaskedModel, magnitude: float, seed: int) -> None:
    """Logits that are C times normal random numbers, and the masks most probable under them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in masked.layers.values():
        blocks = layer.shape.numel() // layer.m
        logits = torch.cat([torch.randn(min(CHUNK, blocks - begin), masked.space.width, generator=generator) * magnitude
                            for begin in range(0, blocks, CHUNK)])
        logits = layer.rows.own(logits.view(layer.shape[0], -1)).reshape(-1, masked.space.width)
        layer.set_logits(lambda part, logits=logits: logits[part])
        layer.bits.copy_(mask_to_bits(masked.space.mode(logits)))
        layer.remember_start()


def init_from_swaps(masked: MaskedModel, sequences: Tensor, magnitude: float, sweeps: int = 6) -> None:
    """Have a MaskedModel start from masks that swaps have improved, and from logits as confident of them as the next
    swap is costly (`swaps.confidence`).

    One pass of the sequences, int64 `[sequences, tokens]`, the first TOKENS tokens of them, through the decoder without
    its head; a layer is improved when the pass reaches it, so that it sees what the improved masks before it make of
    its inputs. One Hessian is kept at a time.
    """
    sequences, hessians = sequences[:-(-TOKENS // sequences.shape[1])], Hessians()

    def improve(name: str, inputs: Tensor) -> None:
        layer = masked.layers[name]
        hessian = hessians.of(inputs).to(layer.weight.device)
        if len(layer.bits):
            mask = swaps.refine_by_swaps(layer.weight, layer.mask_of(layer.bits), hessian, layer.m, sweeps)
            score = swaps.confidence(layer.weight, mask, hessian, layer.m).view(-1, layer.m)
            blocks = mask.view(-1, layer.m)
            layer.bits.copy_(mask_to_bits(blocks))
            layer.set_logits(lambda part: masked.space.init(blocks[part], magnitude, score[part]))
        masked.rewrite(layer)
    modules = {name: layer.module for name, layer in masked.layers.items()}
    visit_in_order(masked.model, modules, sequences, improve, "swapping")
