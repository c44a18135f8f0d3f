"""The loss for learning by gradients, and its gradient with respect to the logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sequence_loss(
    logits: Tensor, chosen: Tensor, teacher: Tensor | None, distill: float
) -> tuple[Tensor, Tensor]:
    """Compute `summed_loss` for one sequence: the loss, float32 `[]`, and its gradient. Compiled,
    it is a few loops over the vocabulary and makes no float32 copy of the logits. chosen: the next
    tokens, int64 `[tokens, 1]`."""
    log_probs = logits.float().log_softmax(-1)
    gradient = log_probs.exp()
    if distill < 1:
        vocabulary = torch.arange(logits.shape[-1], device=logits.device)
        gradient = gradient + torch.where(vocabulary == chosen, distill - 1, 0.0)
    if teacher is not None:
        gradient = gradient - distill * teacher.float().softmax(-1)
    return -log_probs.gather(1, chosen).sum(), gradient.to(logits.dtype)


def summed_loss(
    logits: Tensor,
    sequences: Tensor,
    teacher: Tensor | None = None,
    distill: Sequence[float] | None = None,
    loss_of_sequence: Callable = sequence_loss,
) -> tuple[float, Tensor]:
    """Compute the next-token cross entropy summed over tokens, in nats, and a gradient with respect
    to the logits.

    logits, teacher and gradient: `[sequences, tokens, vocabulary]`. The gradient of sequence i is
    that of (1 - distill[i]) times the cross entropy with the text plus distill[i] times the cross
    entropy with the teacher's predictions. loss_of_sequence: `sequence_loss`, or its compiled
    version.

    Sequences are converted to float32 one at a time, so that no float32 copy of all logits exists.
    The loss is a sum, not a mean, so that float16 gradients stay clear of the smallest numbers of
    float16.
    """
    gradient = torch.empty_like(logits)
    losses = []
    for index, (tokens, share) in enumerate(
        zip(sequences, distill or [0.0] * len(sequences), strict=True)
    ):
        teacher_logits = teacher[index, :-1] if share else None
        loss, gradient[index, :-1] = loss_of_sequence(
            logits[index, :-1], tokens[1:, None], teacher_logits, share
        )
        losses.append(loss)
    gradient[:, -1] = 0
    return sum(torch.stack(losses).tolist()), gradient  # the host waits for the device once
