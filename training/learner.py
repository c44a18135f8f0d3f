"""What every learner does: it moves a masked model's logits, and proposes the mask that is tried on
held-out text."""

from masking.masked_model import MaskedModel

from torch import Tensor


class Learner:
    """A way to learn the masks of a MaskedModel. Its `step`, by which it learns, is its own."""

    def __init__(self, masked: MaskedModel):
        self.masked = masked

    def proposal(self) -> dict[str, Tensor]:
        """The mask to be tried, as bits `[blocks]` of each layer: the most probable one."""
        return self.masked.mode_bits()

    def changed(self) -> float:
        """The share of blocks whose proposed mask is not m0's."""
        return self.masked.changed()
