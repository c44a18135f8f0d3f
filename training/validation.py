"""Select the mask to deliver by its loss on held-out text."""

import math
from collections.abc import Callable

from models import processes
from training.learner import Learner
from utils import UserError

from torch import Tensor

PRIORS = [2 ** (-k / 2) for k in range(1, 21)]  # shares of C * m0: 0.7 to 0.001
PATIENCE = 3  # worse masks in a row that end the search


def hold_out(minibatches: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split minibatches into those to learn from and the last ones, which are held out. Raises
    UserError if none is left to learn from."""
    heldout = math.ceil(round(fraction * len(minibatches), 9))  # as 0.07 * 100 > 7 in floats
    if heldout == len(minibatches):
        raise UserError(
            f"--val_fraction {fraction} of {len(minibatches)} minibatches leaves none to learn from"
        )
    return minibatches[: len(minibatches) - heldout], minibatches[len(minibatches) - heldout :]


class Validation:
    """Keeps the best of the masks that a learner proposes: the one with the lowest loss on held-out
    minibatches. m0 is evaluated first and counts among them.

    heldout: int64 `[minibatches, sequences, tokens]`. It may be empty; then the processes are only
    compared, and the last mask is delivered.
    """

    def __init__(self, learner: Learner, heldout: Tensor):
        self.learner = learner
        self.masked = learner.masked
        self.heldout = heldout
        self.has_text = len(heldout) > 0
        self.bits: dict[str, Tensor] | None = None  # of the best mask
        self.loss, self.step, self.m0_loss = math.inf, None, math.inf  # of the best mask; of m0
        self.dense_loss = math.inf  # unknown
        # the share of C * m0 left in the best mask's logits; None: not searched for
        self.prior: float | None = None

    def evaluate(self, step: int) -> float | None:
        """Return the held-out loss of the present mask, after `step` steps; None if it is not
        finite or nothing is held out. Raises UserError if processes disagree on the logits."""
        if processes.world_size() > 1:
            self.masked.flush()
            replicas = [layer for layer in self.masked.layers.values() if not layer.sharded]
            processes.check_same(str([layer.checksum() for layer in replicas]), "the logits")
        if not self.has_text:
            return None
        # step 0: m0 itself, even if all logits are 0
        bits = self.learner.proposal() if step else self.masked.bits()
        loss = self._try(bits, step)
        if step == 0:
            self.m0_loss = loss
            if not math.isfinite(loss):
                raise UserError(
                    "the held-out loss of m0 is not finite; use --dtype bfloat16 if the model "
                    f"overflows in {self.masked.model.dtype}"
                )
        return loss if math.isfinite(loss) else None

    def _try(self, bits: dict[str, Tensor], step: int, prior: float | None = None) -> float:
        """Return the held-out loss of a mask; keep the mask if it is the best so far."""
        with self.masked.use_masks(bits):
            loss = self.masked.mean_loss(self.heldout)
        if loss < self.loss:
            self.bits = bits
            self.loss = loss
            self.step = step
            self.prior = prior
        return loss

    def weaken_prior(self, m0: dict[str, Tensor], magnitude: float, step: int) -> None:
        """After the last step, remove more and more of the prior C * m0 from the logits, for as
        long as the held-out loss of their most probable mask falls. So what was learned can be
        delivered even if it has not outgrown C.

        m0: masks, bool `[out, in]`; magnitude: C.
        """
        if not self.has_text:
            return
        self.prior = 1.0
        lowest = math.inf
        worse = 0
        bits = {name: layer.bits_of(m0[name]) for name, layer in self.masked.layers.items()}
        for share in PRIORS:
            loss = self._try(self.masked.mode_bits(bits, magnitude * (1 - share)), step, share)
            # an equal loss, as of the same mask, is not worse
            lowest, worse = min(lowest, loss), 0 if loss <= lowest else worse + 1
            if worse == PATIENCE:
                return

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the best mask so far and its losses."""
        layers = self.masked.layers.items() if self.bits else ()
        return (
            {
                "loss": self.loss,
                "step": self.step,
                "m0_loss": self.m0_loss,
                "dense_loss": self.dense_loss,
            },
            {name: layer.shard(self.bits[name]) for name, layer in layers},
        )

    def restore(self, scalars: dict, read: Callable) -> None:
        """Restore from `state`."""
        self.loss = scalars["loss"]
        self.step = scalars["step"]
        self.m0_loss = scalars["m0_loss"]
        self.dense_loss = scalars["dense_loss"]
        if self.step is not None:
            self.bits = {
                name: read(name, layer.shard(layer.bits)).to(layer.bits.device, copy=True)
                # copied, as a mapped tensor would keep the file open
                for name, layer in self.masked.layers.items()
            }
