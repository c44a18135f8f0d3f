"""Learn masks from gradients: straight-through, in MaskPro's linear space. This project's addition
to the paper.

The paper's estimator gets one scalar per step for all blocks. One backward pass at a masked weight
gives the saliency G_i = w_i * df/d(m*w)_i of every weight i, kept or pruned: the change in the
loss, to first order, if i is kept. The expected loss under the distribution of masks then has, to
first order around m, the gradient

    d E[f] / d pi  ~  J^T G,    J = d mu / d pi,    mu_i = P(i is kept)

which is a vector-Jacobian product. It is exact if f is linear in the mask, and biased otherwise. m
is the most probable mask, which is the one to be delivered. In the first half of a run, m is the
soft mask mu(pi / temperature) instead: each weight counts in part, so a step compares many masks,
and J^T G / temperature is the exact gradient of its loss. The temperature falls until soft masks
are almost hard.

No gradient is stored, and the only state besides the logits is a number per block, by which steps
are normalized (training/normalization.py): the backward pass hands each layer's weight gradient to
that layer's logits and frees it. All layers share the scratch buffer of `MaskedModel`, so a layer's
masked weight is written again before its backward. If FSDP shards a layer, it gathers the weight
again and gives each process the mean gradient of that process's rows.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from models import processes
from models.layers import decoder_layers
from models.loading import input_device
from models.sharding import REDUCES_UNUSED
from training.distillation import sequence_loss, summed_loss
from training.faster_model import SHORT, speed_up
from training.learner import Learner
from training.loop import StepResult
from training.normalization import Normalization
from utils import UserError

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HOTTEST = 2.0  # first temperature of soft masks, in logits
COLDEST = 0.4  # last temperature; below, soft masks are hard, and their gradient is noise
SOFT = 0.5  # share of the run that has soft masks


class MaskedProduct(torch.autograd.Function):
    """x `[tokens, in]` -> x W^T + bias, where W is the masked weight. Its backward moves the
    layer's logits and returns no dW."""

    @staticmethod
    def forward(
        ctx: object, x: Tensor, anchor: Tensor, layer: MaskedLayer, learner: "StraightThrough"
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        ctx.learner = learner
        return nn.functional.linear(x, layer.scratch, layer.dense.bias)

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple:
        layer, (x,) = ctx.layer, ctx.saved_tensors
        input_gradient = None
        if ctx.needs_input_grad[0]:
            ctx.learner.masked.write(layer)  # other layers have used the buffer since forward
            input_gradient = upstream @ layer.scratch
        ctx.learner.consume(layer, weight_gradient(upstream, x))
        return input_gradient, None, None, None


def weight_gradient(upstream: Tensor, x: Tensor) -> Tensor:
    """Compute df/dW `[out, in]` from df/dy `[tokens, out]` and the inputs `[tokens, in]`, in their
    dtype; in float32 for float16, which a sum over tokens would overflow."""
    if upstream.dtype != torch.float16:
        return upstream.T @ x
    if upstream.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # from torch 2.8 on
        return torch.mm(upstream.T, x, out_dtype=torch.float32)
    return upstream.float().T @ x.float()


class StraightThrough(Learner):
    """Moves the logits of a MaskedModel by J^T G in each backward pass; the next mask is the most
    probable one.

    tokens: per sequence; checkpointing: whether activations are recomputed in the backward pass.
    """

    def __init__(self, masked: MaskedModel, tokens: int = SHORT, checkpointing: bool = False):
        super().__init__(masked)
        self.keys = {}
        self.reducing = None
        # gradients of earlier microbatches
        self._held = {}
        self._is_last = True
        # an input that needs a gradient, so that autograd follows every layer
        self.anchor = torch.zeros((), requires_grad=True)
        layers = list(masked.layers.values())
        self.normalization = Normalization(masked)
        self._of_sequence = masked.kernels.fastest(sequence_loss)
        # sums over tokens are long
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if (
            processes.world_size() > 1
            and any("expert" in layer.name for layer in layers)
            and not (masked.is_sharded and REDUCES_UNUSED)
        ):
            raise UserError(
                "an expert that one process's text does not reach would leave the other processes "
                "waiting: use --shard with torch 2.13, name other layers with --targets, or start "
                "one process"
            )
        self._reached = set()  # names of sharded layers whose gradient has come in this step
        for layer in layers:
            if layer.sharded:
                masked.undo.append(
                    layer.module.weight.register_post_accumulate_grad_hook(
                        partial(self._take_gradient, layer)
                    ).remove
                )
            else:
                layer.module.with_gradients = self._product
        masked.undo.append(speed_up(masked.model, masked.kernels, tokens, masked.is_sharded))
        if checkpointing:
            masked.undo.append(enable_checkpointing(masked.model))

    def step(
        self,
        batch: Tensor,
        size: float,
        distill: Sequence[float] = (),
        temperature: float = 0.0,
    ) -> StepResult:
        """Run the masked model forward and backward on this process's minibatch, int64 `[sequences,
        tokens]`, and move the logits by `size` (`step_size`).

        distill: for each sequence, the share of its loss, 0 to 1, that compares with the dense
        model's predictions; empty: 0 for all. A loss that is not finite moves nothing. With several
        microbatches, the layers' gradients are summed in the weights' dtype, which takes as much
        memory as the gradients. temperature: of soft masks (`soft_temperature`); 0: masks are hard.
        """
        sequences = batch.to(input_device(self.masked.model))
        self.keys = self.masked.keys()
        self._held = {}
        self._is_finite = True
        self._reached.clear()
        self.normalization.begin_pass(size, temperature or 1.0)
        total = 0.0
        parts = sequences.split(self.masked.microbatch)
        with self.masked.use_soft_masks(temperature):
            for number, part in enumerate(parts, 1):
                self._is_last = number == len(parts)
                total += self._backward(part, distill[: len(part)])
                distill = distill[len(part) :]
        if self._is_finite:
            for layer in self.masked.layers.values():
                if layer.sharded and layer.name not in self._reached:
                    raise RuntimeError(
                        f"FSDP has computed no gradient for {layer.name}: does torch "
                        f"{torch.__version__} call the hooks of its parameters?"
                    )
            self._move_last()
            for name in list(self._held):  # experts that the last microbatch did not reach
                self._move(self.masked.layers[name], self._held.pop(name))
            self.normalization.end_pass()
        self.masked.steps += 1
        loss = total / (batch.shape[0] * (batch.shape[1] - 1))
        losses, not_finite = zip(
            *processes.all_gather([loss, float(self.normalization.not_finite)])
        )
        return StepResult(
            fmean(losses),
            not_finite=int(sum(not_finite) if self.masked.is_sharded else max(not_finite)),
        )

    def _backward(self, sequences: Tensor, distill: Sequence[float]) -> float:
        """Run one microbatch forward and backward; return its loss, summed over tokens. Skips
        backward once a loss was not finite."""
        teacher = None
        if any(distill):
            with torch.no_grad(), self.masked.use_dense():
                teacher = self.masked.model(input_ids=sequences, use_cache=False).logits
        logits = self.masked.model(input_ids=sequences, use_cache=False).logits
        loss, gradient = summed_loss(
            logits.detach(), sequences.to(logits.device), teacher, distill, self._of_sequence
        )
        del teacher  # it is as large as the logits
        self._is_finite = self._is_finite and math.isfinite(processes.mean([loss]))
        if self._is_finite:
            logits.backward(gradient)
        return loss

    # ------------------------------------------------------------------------- in the backward pass

    def _product(self, layer: MaskedLayer, x: Tensor) -> Tensor:
        """Return the layer's output, for its `MaskedLinear`."""
        # flat, as autograd forbids a model to change our function's output in place if it is a view
        return MaskedProduct.apply(x.flatten(0, -2), self.anchor, layer, self).unflatten(
            0, x.shape[:-1]
        )

    def consume(self, layer: MaskedLayer, gradient: Tensor) -> None:
        """Move one layer's logits by df/dW `[out, in]`. The gradient's scale does not matter, as it
        is divided by that of earlier ones. With several processes, a layer moves when the next
        layer's gradient is there; meanwhile the mean over the processes is formed."""
        gradient = self._summed(layer, gradient)
        if gradient is None:
            return
        if processes.world_size() == 1:
            self._move(layer, gradient)
            return
        reducing = layer, processes.all_reduce_mean_async(gradient)
        self._move_last()
        self.reducing = reducing

    def _summed(self, layer: MaskedLayer, gradient: Tensor) -> Tensor | None:
        """Return the sum of the microbatches' gradients; None before the last microbatch."""
        if layer.name in self._held:
            gradient += self._held.pop(layer.name)
        if self._is_last:
            return gradient
        self._held[layer.name] = gradient

    def _take_gradient(self, layer: MaskedLayer, parameter: Tensor) -> None:
        """Hook for a sharded layer: FSDP has reduced its gradient to this process's rows of the
        mean over processes."""
        gradient = parameter.grad.to_local()
        parameter.grad = None
        self._reached.add(layer.name)
        if (gradient := self._summed(layer, gradient)) is not None:
            self._move(layer, gradient)

    def _move_last(self) -> None:
        if self.reducing:
            (layer, wait), self.reducing = self.reducing, None
            self._move(layer, wait())

    def _move(self, layer: MaskedLayer, gradient: Tensor) -> None:
        self.normalization.move(layer, gradient, self.keys[layer.name])

    # ----------------------------------------------------------------------------- save and restore

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the running mean squares of J^T G."""
        return {}, self.normalization.state()

    def restore(self, scalars: dict, read: Callable) -> None:
        """Restore from `state`."""
        self.normalization.restore(read)


def decay(progress: float) -> float:
    """Return the factor on the step size when the share `progress` of a run is done: linear decay,
    after a warm-up in the first fiftieth."""
    return (1 - progress) * min(1.0, (progress + 1e-3) / 0.02)


def step_size(lr: float, progress: float, steps: float) -> float:
    """Return the size of the next step, in logits, in a run of `steps` steps of which the share
    `progress` is done.

    lr: total movement of a logit over the whole run under pure-noise gradients (standard deviation,
    in logits). Such a random walk has the variance size^2 sum of (1 - t/T)^2 = size^2 T/3. So a
    logit whose gradient is noise moves as far in a long run as in a short one, and a logit whose
    gradient is consistent moves further.
    """
    return lr * decay(progress) * math.sqrt(3 / steps)


def soft_temperature(progress: float) -> float:
    """Return the temperature of soft masks, in logits, if the share `progress` of a run is done. It
    falls by equal factors; 0: masks are hard."""
    return HOTTEST * (COLDEST / HOTTEST) ** (progress / SOFT) if progress < SOFT else 0.0


def enable_checkpointing(model: nn.Module) -> Callable[[], None]:
    """Keep only each decoder layer's input for backward, and run the layer again there. Returns a
    function that undoes this. The model stays in eval mode, in which the libraries' own
    checkpointing does nothing."""
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )

    def restore() -> None:
        for layer in layers:
            del layer.forward

    return restore
