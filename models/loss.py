"""The loss of a causal LM on tokens, f(w, batch)."""

from models.loading import Tokenizer, input_device
from utils import UserError

import torch
from torch import Tensor, nn

BOS_MATTERS = 0.1  # a share of the loss


@torch.no_grad()
def batch_loss(
    model: nn.Module, batch: Tensor, microbatch: int = 32, bos: int | None = None
) -> float:
    """f(w, batch): mean next-token cross entropy in nats, float32, over int64 `[sequences,
    tokens]`.

    `microbatch` sequences go through one whole-model forward; the head's logits are taken to
    float32 a few sequences at a time, so that no [sequences, tokens, vocabulary] float32 copy is
    made.

    With `bos` the model reads that token before each sequence. The same tokens are scored, all but
    the first of each; and as many are read, since the last is only predicted.
    """
    check_tokens(model, batch if bos is None else nn.functional.pad(batch, (1, 0), value=bos))
    total = 0.0
    count = batch.shape[0] * (batch.shape[1] - 1)
    for sequences in batch.to(input_device(model)).split(microbatch):
        inputs = (
            sequences if bos is None else nn.functional.pad(sequences[:, :-1], (1, 0), value=bos)
        )
        logits = model(input_ids=inputs, use_cache=False).logits
        logits = logits[:, :-1] if bos is None else logits[:, 1:]
        targets = sequences.to(logits.device)
        for some, tokens in zip(logits.split(4), targets.split(4)):
            total += nn.functional.cross_entropy(
                some.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
            )
    return float(total) / count


def bos_hint(model: nn.Module, tokenizer: Tokenizer, sequences: Tensor, what: str) -> str | None:
    """A line that recommends --bos where the token lowers, by more than BOS_MATTERS, the loss of
    the first of these sequences that does not begin with it; else None. sequences: int64
    `[sequences, tokens]`; what: one of them is."""
    bos = tokenizer.bos_token_id
    sequence = next((sequence[None] for sequence in sequences if sequence[0] != bos), None)
    if (
        bos is None
        or sequence is None
        or bos >= model.get_input_embeddings().weight.shape[0]
        or sequence.numel() < 2
    ):
        return None  # no such token, nothing without it, no embedding of it, nothing to predict
    without = batch_loss(model, sequence)
    behind = batch_loss(model, sequence, bos=bos)
    if not behind < (1 - BOS_MATTERS) * without:
        return None
    return (
        "--bos is for this model: with the beginning-of-text token in front, the loss of the "
        f"first {what} that has none falls from {without:.3f} to {behind:.3f} nats"
    )


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """UserError where the model has no embedding for a token."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    if tokens.max() >= embeddings:
        raise UserError(
            f"the tokenizer makes token {int(tokens.max())} and the model has {embeddings} "
            "embeddings; give a --model whose tokenizer is its own"
        )
