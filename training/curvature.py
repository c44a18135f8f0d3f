"""The loss's second order in each weight, for masks learned from gradients. This project's addition to the paper.

G_i, the saliency of a weight, is the loss's gradient at the mask as it is. To second order, adding weight i changes the
loss by G_i + h_i / 2, and having kept one has changed it by G_i - h_i / 2: the gradient half way,

    G_i + h_i (1/2 - m_i),    h_i = w_i^2 F_i

Without it what is pruned seems better than it is, and what is kept worse; blocks whose choice is close flip to and fro,
until chance leaves them on one side. That is what tries masks out in the first half of a run, so h counts from START on
and in full from FULL on.

F is the Fisher information's diagonal, factored as in K-FAC (Martens & Grosse, arXiv 1503.05671): the mean square of
the layer's input in a column times that of the loss's gradient at its output in a row, the tokens that follow being
drawn from the model's own predictions. That is a number a row and a column instead of one a weight.
"""
from functools import partial

from masking.block_bits import bits_to_mask
from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from models import processes
from training.loss import sequence_loss, summed_loss

import torch
from torch import Tensor

START, FULL = 0.5, 0.9  # shares of the run
SEQUENCES, EVERY = 8, 20  # sequences and steps between two measurements
KEPT = 0.5  # the share of the earlier measurements in the mean


def with_curvature(gradient: Tensor, weight: Tensor, bits: Tensor, outputs: Tensor, inputs: Tensor, m: int) -> Tensor:
    """g_ij + outputs_i inputs_j w_ij (1/2 - m_ij), in g's dtype: times w_ij, G + h (1/2 - m). gradient, weight
    `[rows, in]`; bits `[rows * in / M]`; outputs `[rows]`, inputs `[in]`, float32."""
    kept = bits_to_mask(bits, m).view(weight.shape).float()
    return (gradient.float() + outputs[:, None] * inputs * weight.float() * (0.5 - kept)).to(gradient.dtype)


class Curvature:
    """Adds the curvature to the gradients of a MaskedModel's layers, and measures it from time to time."""

    def __init__(self, masked: MaskedModel):
        self.masked = masked
        self.share, self.tokens, self.is_measuring = 0.0, 1, False
        layers = list(masked.layers.values())
        self._sizes = [size for layer in layers for size in layer.shape]
        self.mean_squares = torch.full((sum(self._sizes),), torch.nan, device=layers[0].weight.device)  # NaN: none yet
        places = self.mean_squares.split(self._sizes)
        self.factors = {layer.name: pair for layer, pair in zip(layers, zip(places[::2], places[1::2]))}  # [out], [in]
        self._add, self._of_sequence = map(masked.kernels.fastest, (with_curvature, sequence_loss))

    def begin_step(self, sequences: Tensor, progress: float) -> None:
        """Before a step on int64 `[sequences, tokens]`, at this share of the run, 0 to 1: measure on the first of them
        where it is time."""
        self.tokens = sequences.numel()  # over which this step's gradients are summed
        self.share = min(1.0, max(0.0, progress - START) / (FULL - START))
        if self.share and (self.masked.steps % EVERY == 0 or bool(self.mean_squares.isnan().all())):
            self.measure(sequences[:SEQUENCES])

    def added_to(self, gradient: Tensor, layer: MaskedLayer) -> Tensor:
        """df/d(m * w) `[rows, in]`, summed over `tokens`, and what the curvature adds to it."""
        if not self.share:
            return gradient
        outputs, inputs = (part.to(layer.weight.device).nan_to_num(0.0) for part in self.factors[layer.name])
        return self._add(gradient, layer.weight, layer.bits, layer.rows.own(outputs) * (self.share * self.tokens),
                         inputs, layer.m)

    def measure(self, sequences: Tensor) -> None:
        """Renew the mean squares by a forward and a backward pass, in all processes alike: their means are taken."""
        self._generator = None
        found = sum(len(part) / len(sequences) * self._mean_squares(part)
                    for part in sequences.split(self.masked.microbatch))
        found = processes.reduce_async(found)()
        mixed = torch.where(self.mean_squares.isfinite(), torch.lerp(found, self.mean_squares, KEPT), found)
        self.mean_squares.copy_(torch.where(found.isfinite(), mixed, self.mean_squares))

    def _mean_squares(self, sequences: Tensor) -> Tensor:
        """Those of one microbatch, in the order of `mean_squares`; NaN where there are none."""
        found = torch.full_like(self.mean_squares, torch.nan)
        places = iter(found.split(self._sizes))
        hooks = [layer.module.register_forward_hook(partial(_watch, next(places), next(places)))
                 for layer in self.masked.layers.values()]
        logits = self.masked.model(input_ids=sequences, use_cache=False).logits
        if processes.mean([float(logits.isfinite().all())]) == 1:  # else nothing can be drawn, and found stays NaN
            drawn = self._drawn(logits.detach(), sequences)
            _, gradient = summed_loss(logits.detach(), drawn, of_sequence=self._of_sequence)
            self.is_measuring = True
            logits.backward(gradient)
            self.is_measuring = False
        for hook in hooks:
            hook.remove()
        return found

    def _drawn(self, logits: Tensor, sequences: Tensor) -> Tensor:
        """Sequences whose every next token the model has drawn itself; its random numbers are those of this step."""
        if self._generator is None:
            seed = (self.masked.seed * 1_000_003 + self.masked.steps) % 2**63
            self._generator = torch.Generator(logits.device).manual_seed(seed)
        drawn = [torch.multinomial(some[:-1].float().softmax(-1), 1, generator=self._generator).T for some in logits]
        return torch.cat([sequences[:, :1].to(logits.device), torch.cat(drawn)], 1)


def _watch(at_outputs: Tensor, of_inputs: Tensor, _module: torch.nn.Module, inputs: tuple[Tensor],
           output: Tensor) -> None:
    """A forward hook: mean squares of a layer's inputs and, when backward has been there, of its outputs' gradient."""
    def mean_square(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten(0, -2).float().square().mean(0)

    def keep(upstream: Tensor) -> None:
        at_outputs.copy_(mean_square(upstream))
        of_inputs.copy_(of_input)
    of_input = mean_square(inputs[0])
    output.register_hook(keep)
