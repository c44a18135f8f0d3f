"""What all learners share: a learner moves a masked model's logits and proposes the mask to be
evaluated on held-out text."""

from masking.masked_model import MaskedModel

from torch import Tensor


class Learner:
    """Base class for learning the masks of a MaskedModel. Each subclass defines its own `step`."""

    def __init__(self, masked: MaskedModel):
        self.masked = masked

    def proposal(self) -> dict[str, Tensor]:
        """Return the mask to be evaluated, as bits `[blocks]` per layer: the most probable one."""
        return self.masked.mode_bits()

    def changed(self) -> float:
        """Return the share of blocks in which the proposed mask differs from m0."""
        return self.masked.changed()
