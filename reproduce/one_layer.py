"""Runs train.py on only the last decoder layers, as in the authors' early logs, at the cost of
these layers.

    python reproduce/one_layer.py --model demo/model --targets layers.29. \\
        --dataset demo/train.jsonl --mask MASK \\
        --baseline BASELINE --batchsize 8 --lr 2 --logits 5

All flags are train.py's. The layers before the first learned one keep m0, so their output for a
sequence is kept in memory, and later steps on the sequence start from it. The results are equal to
train.py's, to the bit.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

utils.use_short_spins()

import train
from masking.masked_model import MaskedModel
from models.layers import decoder_layers
from utils import run_script

import torch
from torch import Tensor, nn


class KeptStates:
    """Caches the input of a model's decoder layer number `first` for each sequence, and skips the
    layers before it when it is known."""

    def __init__(self, model: nn.Module, first: int):
        self.states: dict[bytes, Tensor] = {}  # token ids of a sequence -> `[tokens, hidden]`
        self.rows = []
        self.is_known = False
        self.are_tuples = False
        embeddings = model.get_input_embeddings()
        layers = decoder_layers(model)
        self.embed = embeddings.forward
        embeddings.forward = self.begin
        layers[first].register_forward_pre_hook(self.keep, with_kwargs=True)
        for layer in layers[:first]:
            layer.forward = self.passing(layer.forward)

    def begin(self, tokens: Tensor) -> Tensor:
        """Replace the embeddings' forward: return the cached states if they are known for all of
        these sequences, int64 `[sequences, tokens]`, otherwise the embeddings."""
        self.rows = [row.numpy().tobytes() for row in tokens.cpu()]
        self.is_known = all(row in self.states for row in self.rows)
        return (
            torch.stack([self.states[row] for row in self.rows])
            if self.is_known
            else self.embed(tokens)
        )

    def passing(self, forward: Callable) -> Callable:
        """Return a layer's forward that passes its input on if the cached states are in use."""

        def passed(hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple:
            if self.is_known:
                return (hidden_states,) if self.are_tuples else hidden_states
            output = forward(hidden_states, *args, **kwargs)
            self.are_tuples = isinstance(output, tuple)  # transformers 4
            return output

        return passed

    def keep(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Cache the states before the first learned layer, unless they are known."""
        if not self.is_known:
            states = args[0] if args else kwargs["hidden_states"]
            self.states |= {row: state.clone() for row, state in zip(self.rows, states)}


class Masked(MaskedModel):
    """A MaskedModel whose layers before the first learned one run only once per sequence."""

    def __init__(self, model: nn.Module, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        learned = {layer.module for layer in self.layers.values()}
        self.kept = KeptStates(
            model,
            next(
                number
                for number, layer in enumerate(decoder_layers(model))
                if learned & set(layer.modules())
            ),
        )

    @contextmanager
    def use_dense(self) -> Iterator[None]:
        """Do as MaskedModel's, with a separate cache, so that outputs of dense layers are not
        kept."""
        of_m0 = self.kept.states
        self.kept.states = {}
        try:
            with super().use_dense():
                yield
        finally:
            self.kept.states = of_m0


if __name__ == "__main__":
    train.MaskedModel = Masked
    run_script(train.main)
