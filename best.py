"""Which mask is delivered, and whether the run still goes where it should: what held-out text says."""
import math
from statistics import mean, stdev

from torch import Tensor

from masked_model import MaskedModel

WINDOW = 32  # steps at least, whose mean loss is compared with that of the first so many
PATIENCE = 3  # windows, or looks, in a row above where the run started: it diverges


class Best:
    """The most probable mask with the lowest loss on held-out minibatches; m0, looked at first, is one of them."""

    def __init__(self, masked: MaskedModel, judge):
        self.masked, self.judge = masked, judge
        self.bits: dict[int, Tensor] | None = None
        self.loss, self.step, self.first = math.inf, None, math.inf  # of the best; held-out loss of m0

    def look(self, step: int) -> float | None:
        """The held-out loss of the present mask, that after so many steps; None where it is not finite."""
        bits = self.masked.mode_bits()
        with self.masked.showing(bits):
            loss = self.judge()
        if step == 0:
            self.first = loss
        if loss < self.loss:
            self.bits, self.loss, self.step = bits, loss, step
        return loss if math.isfinite(loss) else None

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        layers = self.masked.layers.items() if self.bits else ()
        return ({"loss": self.loss, "step": self.step, "first": self.first},
                {name: layer.part(self.bits[id(layer)]) for name, layer in layers})

    def restore(self, scalars: dict, read) -> None:
        self.loss, self.step, self.first = scalars["loss"], scalars["step"], scalars["first"]
        if self.step is not None:
            self.bits = {id(layer): read(name, layer.part(layer.bits)).to(layer.bits.device)
                         for name, layer in self.masked.layers.items()}


def diverging(metrics: list[dict], minibatches: int, first: float) -> str | None:
    """How the loss has been above where it started for long, in words; None if it has not.

    metrics: the steps so far. Held out: the last PATIENCE looks are all above `first`, the loss of m0. Else training:
    the means of the last PATIENCE windows are all above that of the first by twice its standard error and theirs. A
    window is an epoch of these minibatches, or WINDOW steps.
    """
    looks = [line["heldout"] for line in metrics if line.get("heldout") is not None]
    if looks:
        if len(looks) >= PATIENCE and min(looks[-PATIENCE:]) > first:
            return f"the held-out loss is {looks[-1]:.4f} nats, and above the {first:.4f} of m0"
        return None
    losses = [line["loss"] for line in metrics]
    size = max(WINDOW, minibatches if minibatches * (PATIENCE + 1) <= len(losses) else 0)
    if len(losses) < size * (PATIENCE + 1):
        return None
    start, *later = [losses[:size]] + [losses[len(losses) - size * k:][:size] for k in range(PATIENCE, 0, -1)]
    if all(mean(window) - mean(start) > 2 * (math.hypot(stdev(window), stdev(start)) / size**0.5) for window in later):
        return f"the training loss is {mean(later[-1]):.4f} nats, and above the {mean(start):.4f} it started at"
    return None
