"""Several masks a step, all scored on one minibatch: less noise a step, and work for several processes (--samples)."""
from statistics import fmean

from torch import Tensor

from masking.masked_model import MaskedModel
from models.loss import batch_loss
from models.processes import ProcessGroup
from pge import Estimator
from training.baselines import Baseline
from training.progress import StepResult


class MultiSample:
    """Policy gradient from K masks a step: pi <- pi - lr / K * sum_k A_k grad log p(m_k | pi), the masks shared out to
    the processes. Each is drawn again where it is needed (`MaskedModel.draw`), so that none is kept."""

    def __init__(self, masked: MaskedModel, batches: Tensor, baseline: Baseline, estimator: Estimator,
                 group: ProcessGroup, samples: int, microbatch: int = 32):
        self.masked, self.batches = masked, batches
        self.baseline, self.estimator = baseline, estimator
        self.group, self.samples, self.microbatch = group, samples, microbatch

    def step(self, batch_indices: list[int], lr: float) -> StepResult:
        """One step on the one minibatch; lr: eta, in logits per nat of advantage."""
        index, = batch_indices
        batch, losses = self.batches[index], []
        for sample in self.group.split(range(self.samples)):
            self.masked.draw(sample)
            losses.append(batch_loss(self.masked.model, batch, self.microbatch))
        reference = self.baseline(index, batch)
        found = self.group.all_gather([reference, *losses])
        losses = [loss for _, *theirs in found for loss in theirs]
        references = [theirs for theirs, *rest in found for _ in rest]
        result = StepResult(losses, references)
        if not result.is_finite:
            self.masked.count_step(redraw=True)  # other masks may do better
            return result
        advantages = self.estimator.advantages(losses, references, [index] * self.samples)
        self.masked.update_many([lr * advantage / self.samples for advantage in advantages])
        result.advantage, result.delta = fmean(advantages), self.estimator.delta
        return result

    def state(self) -> tuple[dict, dict]:
        """The estimator's; the masks are drawn again."""
        return self.estimator.state()

    def restore(self, scalars: dict, read: object = None) -> None:
        """From `state`."""
        self.estimator.restore(scalars)
