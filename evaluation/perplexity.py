"""Perplexity on disjoint windows of a text, the protocol of SparseGPT, Wanda and MaskLLM."""

import math

from models.loss import batch_loss
from utils import UserError, progress_bar

from torch import Tensor, nn

LARGEST = 700  # largest loss, in nats, whose exp fits a float


def perplexity(nats: float) -> float:
    """Return exp(nats), of a mean loss in nats; inf if it exceeds the range of a float."""
    return math.exp(nats) if nats < LARGEST else math.inf


def evaluate_windows(model: nn.Module, windows: Tensor, bos: int | None = None) -> dict[str, float]:
    """Return `ppl`, the perplexity, and `nats`, the mean loss, over int64 `[windows, tokens]`.

    bos: a token to put before each window that does not begin with it. Raises UserError if the
    perplexity is not finite.
    """
    losses = [
        batch_loss(model, window[None], bos=None if window[0] == bos else bos)
        for window in progress_bar(windows, desc="perplexity", unit="window")
    ]
    nats = sum(losses) / len(losses)
    if not nats < LARGEST:
        raise UserError(
            f"the perplexity is not finite; {model.dtype} may overflow: try --dtype bfloat16 or "
            "float32"
        )
    return {"ppl": perplexity(nats), "nats": nats}
