"""The next-token loss of a causal LM, f(w, batch)."""

from models.loading import Tokenizer, input_device
from utils import UserError

import torch
from torch import Tensor, nn

BOS_MATTERS = 0.1  # relative fall of the loss above which --bos is recommended


@torch.no_grad()
def batch_loss(
    model: nn.Module, batch: Tensor, microbatch: int = 32, bos: int | None = None
) -> float:
    """Return f(w, batch), the mean next-token cross entropy in nats, computed in float32.

    batch: int64 `[sequences, tokens]`. Each forward pass takes `microbatch` sequences. The head's
    logits are converted to float32 a few sequences at a time, so that no float32 copy of
    `[sequences, tokens, vocabulary]` is made.

    bos: a token that the model reads before each sequence. The same tokens are scored as without
    it, all but the first of each sequence, and the model reads as many, since the last token is
    only predicted.
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
        for chunk, tokens in zip(logits.split(4), targets.split(4)):
            total += nn.functional.cross_entropy(
                chunk.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
            )
    return float(total) / count


def bos_hint(model: nn.Module, tokenizer: Tokenizer, sequences: Tensor, what: str) -> str | None:
    """Return a line that recommends --bos, or None.

    It is recommended if the token lowers the loss of the first sequence that does not begin with it
    by more than BOS_MATTERS. sequences: int64 `[sequences, tokens]`; what: the name of one sequence
    in the line, such as "window".
    """
    bos = tokenizer.bos_token_id
    sequence = next((sequence[None] for sequence in sequences if sequence[0] != bos), None)
    if (
        bos is None
        or sequence is None
        or bos >= model.get_input_embeddings().weight.shape[0]
        or sequence.numel() < 2
    ):
        return None  # no BOS, no sequence without it, no embedding for it, or nothing to predict
    plain_loss = batch_loss(model, sequence)
    bos_loss = batch_loss(model, sequence, bos=bos)
    if not bos_loss < (1 - BOS_MATTERS) * plain_loss:
        return None
    return (
        "use --bos for this model: a beginning-of-text token lowers the loss of the first "
        f"{what} without one from {plain_loss:.3f} to {bos_loss:.3f} nats"
    )


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raise UserError if the model has no embedding for one of the tokens."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    if tokens.max() >= embeddings:
        raise UserError(
            f"the tokenizer produces token {int(tokens.max())} but the model has only {embeddings} "
            "embeddings; give a --model with its own tokenizer"
        )
