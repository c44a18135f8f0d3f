"""One-shot pruning, layer by layer: keep the weights with the largest scores, or use SparseGPT.

magnitude   |w_ij|
wanda       |w_ij| * ||x_j||      ||x_j||: norm of input feature j over the calibration tokens
            (arXiv 2306.11695)
sparsegpt   see sparsegpt.py
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import pge
from masking.layers import apply_masks
from models import processes
from models.layers import weight_matrix
from pruning import sparsegpt
from pruning.calibration import for_each_layer, hessian_of, input_norms
from pruning.swaps import refine_by_swaps
from utils import progress_bar

import torch
from torch import Tensor, nn


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """Return the scores |w| ||x|| of weight `[out, in]` and norms `[in]`."""
    return weight.abs() * norms


def largest(score: Tensor, n: int, m: int) -> Tensor:
    """Return the mask, bool `[out, in]`, of the n largest of every m scores along a row, ties to
    the lower index. score: float `[out, in]`."""
    return pge.mode(score.reshape(-1, m), n).view(score.shape)


@dataclass
class OneShot:
    """Settings of one-shot pruning. sparsity_type: (N, M); true_sequential: later layers see the
    earlier ones pruned; swaps: most sweeps of `refine_by_swaps` over the score's mask."""

    prune_method: str = "wanda"
    sparsity_type: tuple[int, int] = (2, 4)
    true_sequential: bool = False
    swaps: int = 0

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.prune_method != "magnitude" or self.swaps > 0

    def mask(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """Return the mask by the method's score, bool `[out, in]`, or by magnitude if there are no
        norms or all are 0. weight: float32 `[out, in]`; norms `[in]`."""
        is_wanda = self.prune_method == "wanda" and norms is not None and bool(norms.any())
        return largest(wanda(weight, norms) if is_wanda else weight.abs(), *self.sparsity_type)

    def pruned_weight(
        self, weight: Tensor, inputs: Tensor, hessian: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return a layer's sparse weight, float32 `[out, in]`. inputs: those of the layer on the
        calibration tokens, `[sequences, tokens, in]`; hessian: inputs -> their Hessian."""
        weight = weight.float()
        if self.prune_method == "sparsegpt":
            return sparsegpt.solve(weight, hessian(inputs), self.sparsity_type)[0]
        norms = sum(
            part.float().square().sum(0) for part in inputs.flatten(0, -2).split(8192)
        ).sqrt()
        mask = self.mask(weight, norms)
        if self.swaps:
            mask = refine_by_swaps(weight, mask, hessian(inputs), self.sparsity_type[1], self.swaps)
        return weight.masked_fill(~mask, 0.0)


@torch.no_grad()
def one_shot_masks(
    model: nn.Module, layers: dict[str, nn.Module], samples: Tensor | None, settings: OneShot
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, mask bool `[out, in]`) of these layers by a score, one at a time; no weight
    changes. samples: int64 `[sequences, tokens]`, None for magnitude; settings: only prune_method
    and sparsity_type are used. Layers that the samples do not reach, such as experts, get masks by
    magnitude, which is logged."""
    norms = {} if samples is None else input_norms(model, layers, samples)
    _note_unreached([name for name, norm in norms.items() if not norm.any()], len(layers))
    for name in progress_bar(layers, desc="pruning", unit="layer", disable=not layers):
        yield name, settings.mask(weight_matrix(layers[name]).float(), norms.get(name))


def _note_unreached(names: list[str], total: int) -> None:
    if names:
        processes.log(
            f"note: the text does not reach {len(names)} of {total} layers, {names[0]} among "
            "them; these are pruned by magnitude"
        )


@torch.no_grad()
def prune_model(
    model: nn.Module, layers: dict[str, nn.Module], samples: Tensor | None, settings: OneShot
) -> None:
    """Prune these layers in place. samples: int64 `[sequences, tokens]`, None for magnitude. Layers
    that the samples do not reach, such as experts, are pruned by magnitude, which is logged."""
    if samples is not None and (
        settings.prune_method == "sparsegpt" or settings.true_sequential or settings.swaps
    ):
        # a layer needs its inputs on all samples at once
        reached = _prune_in_one_pass(model, layers, samples, settings)
        total = len(layers)
        layers = {name: module for name, module in layers.items() if name not in reached}
        _note_unreached(list(layers), total)
        samples = None  # so that the others are pruned by magnitude
    for name, mask in one_shot_masks(model, layers, samples, settings):
        apply_masks(layers, {name: mask})


def _prune_in_one_pass(
    model: nn.Module, layers: dict[str, nn.Module], samples: Tensor, settings: OneShot
) -> set[str]:
    """Send all samples through the decoder in one pass, and compute each layer's sparse weight when
    the pass reaches it. With true_sequential it is written at once, else after the layer has
    computed. Returns the names of the layers that the pass has reached."""
    reached = set()
    pending = {}
    cached_hessian = lru_cache(1)(hessian_of)  # q, k and v read the same tensor

    def prune(name: str, inputs: Tensor) -> None:
        write_pending()  # the layer before has computed
        if not inputs.numel():  # an expert that is called without tokens
            return
        weight = weight_matrix(layers[name])
        reached.add(name)
        pruned = settings.pruned_weight(weight.to(inputs.device), inputs, cached_hessian)
        pending[name] = pruned.to(weight)
        if settings.true_sequential:
            write_pending()

    def write_pending() -> None:
        for name, pruned in pending.items():
            weight_matrix(layers[name]).copy_(pruned)
        pending.clear()

    for_each_layer(model, layers, samples, prune, "pruning")
    write_pending()
    return reached
