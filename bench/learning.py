"""The problem that bench/rivals.py compares methods on, and this project's ways to learn its
mask."""

import copy
from collections.abc import Callable

import common
import data
import pge
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loading import load_model
from models.loss import batch_loss
from pruning.calibration import input_norms
from pruning.one_shot import OneShot, one_shot_masks
from training.straight_through import StraightThrough, soft_temperature, step_size

from small_model import HELDOUT, TEXT
from torch import Tensor, nn

N = 2
M = 4


class Problem:
    """A dense model, its text, and Wanda's 2:4 mask m0. windows: the number of windows of 128
    tokens of held-out text, after the first `skip`, that the loss is measured on."""

    def __init__(self, model: str, windows: int, device: str, skip: int = 0):
        self.model, self.tokenizer = load_model(model, "auto", device)
        self.fixed = data.minibatches(self.tokenizer, TEXT, 512, 32, 128)
        self.heldout = data.perplexity_windows(self.tokenizer, HELDOUT, 128, skip + windows)[0][
            skip:
        ]
        layers = find_layers(self.model)
        samples = data.calibration_samples(self.tokenizer, TEXT, 128, 128, 0)
        self.masks = dict(one_shot_masks(self.model, layers, samples, OneShot("wanda", (N, M))))
        self.norms = input_norms(self.model, layers, samples)
        m0 = self.masked_model(self.masks)
        self.dense_loss = batch_loss(self.model, self.heldout)
        self.m0_loss = batch_loss(m0, self.heldout)
        self.baselines = [batch_loss(m0, batch) for batch in self.fixed]

    def fresh_model(self) -> nn.Module:
        """Return a copy of the dense model."""
        return copy.deepcopy(self.model)

    def masked_model(self, masks: dict[str, Tensor]) -> nn.Module:
        """Return a copy of the dense model with these masks applied."""
        model = self.fresh_model()
        apply_masks(find_layers(model), masks)
        return model

    def batches(self, setting: dict, passes: int, seed: int) -> Tensor:
        """Return the minibatches of a run, int64 `[minibatches, sequences, tokens]`. With `fresh`
        text no sequence is repeated while text lasts; otherwise they are the fixed minibatches,
        rotated by the seed."""
        if setting.get("fresh"):
            return data.token_sequences(
                self.tokenizer, [TEXT], passes * 32 * 128, setting["batchsize"], 128, seed
            )
        return self.fixed.roll(-5 * seed, 0)


class ForwardOnly:
    """The paper's method: policy gradient, one forward pass per step. The setting's `estimator`
    makes the estimator."""

    def __init__(self, problem: Problem, setting: dict, seed: int):
        self.lr = setting["lr"]
        self.estimator = setting["estimator"]()
        self.masked = MaskedModel(
            problem.fresh_model(),
            problem.masks,
            LinearSpace(N, M),
            setting["logits"],
            seed=seed,
            backend="eager",
        )
        start = 5 * seed % len(problem.baselines)  # the order of `Problem.batches`
        self.baselines = problem.baselines[start:] + problem.baselines[:start]

    def learn(self, batch: Tensor, step: int, steps: int) -> None:
        """Take step number `step` of `steps` on a batch, int64 `[sequences, tokens]`."""
        index = step % len(self.baselines)
        loss = self.masked.loss(batch)
        self.masked.update(self.lr * self.estimator.advantage(loss, self.baselines[index]))

    def masks(self) -> dict[str, Tensor]:
        """Return the most probable masks."""
        return self.masked.masks_of(self.masked.mode_bits())

    def kept(self) -> list[Tensor]:
        """Return the tensors that are kept in addition to the model."""
        return [
            tensor
            for layer in self.masked.layers.values()
            for tensor in (*layer.logits, layer.bits)
        ]

    def state_bytes(self) -> float:
        """Return the bytes per weight that are kept in addition to the model."""
        weights = sum(layer.weight.numel() for layer in self.masked.layers.values())
        return sum(tensor.nbytes for tensor in self.kept()) / weights


class Gradients(ForwardOnly):
    """This project's method: straight-through gradients, as in sparsify.py."""

    def __init__(self, problem: Problem, setting: dict, seed: int):
        super().__init__(problem, {"estimator": lambda: pge.Estimator("vanilla"), **setting}, seed)
        self.distill = setting["distill"]
        self.learner = StraightThrough(self.masked)

    def learn(self, batch: Tensor, step: int, steps: int) -> None:
        """Take step number `step` of `steps` on a batch, int64 `[sequences, tokens]`."""
        size = step_size(self.lr, step / steps, steps)
        temperature = soft_temperature(step / steps)
        self.learner.step(batch, size, [self.distill] * len(batch), temperature)

    def kept(self) -> list[Tensor]:
        """Return the tensors that are kept in addition to the model."""
        return super().kept() + list(self.learner.normalization.state().values())


def passes_a_step(setting: dict) -> float:
    """Return the cost of a step in forward passes of 32 sequences. A backward pass counts as two,
    the teacher's forward pass of distillation as one."""
    if setting["learner"] == "forward_only":
        return 1
    return (4 if setting.get("distill") else 3) * setting["batchsize"] / 32


OURS: dict[str, Callable] = {"forward_only": ForwardOnly, "gradients": Gradients}
DEFAULTS = dict(common.DEFAULTS, learner="gradients", swaps=True, fresh=True)
