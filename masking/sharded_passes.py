"""Forward passes of a model that FSDP shards: each must gather all rows, under its own masks."""

from masking.masked_layer import MaskedLayer

from torch import Tensor, nn


class ShardedPasses:
    """Counts a sharded model's forward passes. Raises RuntimeError after a pass in which FSDP has
    not asked for all rows: a weight that it keeps gathered has an old mask."""

    def __init__(self, model: nn.Module, layers: dict[str, MaskedLayer]):
        self.model = model
        self.layers = layers
        self.count = 0
        self.written: dict[str, int] = {}  # layer name -> last pass that its rows were written for
        begin = model.register_forward_pre_hook(self._begin, prepend=True)
        end = model.register_forward_hook(self._check)
        self.hooks = [begin, end]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self.hooks:
            hook.remove()

    def note_written(self, layer: MaskedLayer) -> None:
        """Note that the layer's masked rows have been written for this pass."""
        self.written[layer.name] = self.count

    def _begin(self, *_: object) -> None:
        if self.count and hasattr(self.model, "reset_iter_state"):  # torch 2.13
            # else FSDP prefetches in the order of earlier passes, in vain
            self.model.reset_iter_state()
        self.count += 1

    def _check(self, *_: object) -> None:
        stale = [
            layer.name
            for layer in self.layers.values()
            if len(layer.bits) and self.written.get(layer.name) != self.count
        ]
        if stale:
            raise RuntimeError(
                f"{len(stale)} layers computed with an old mask, {stale[0]} among them: FSDP did "
                "not gather them"
            )


def set_gathered(layer: MaskedLayer, masked_rows: Tensor) -> None:
    """Overwrite the weight that FSDP has gathered in this pass with the rows of all processes.
    masked_rows: those of this process, `[rows, in]`."""
    gathered = layer.rows.whole(masked_rows.view(-1), layer.shape[1])
    layer.dense.weight.data.copy_(gathered.view(layer.shape))
