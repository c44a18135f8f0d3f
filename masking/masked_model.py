"""A frozen model under learned masks: when its logits move, when its masks are drawn, and which
mask it uses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from masking.kernels import Kernels
from masking.masked_layer import MaskedLayer, MaskedLinear, replace_modules, scratch_buffers
from masking.random_bits import layer_keys
from masking.sharded_passes import ShardedPasses, set_gathered
from masking.spaces import Space
from models import processes
from models.layers import find_layers
from models.loss import batch_loss
from models.sharding import Rows, own_weight

import torch
from torch import Tensor, nn

Bits = dict[str, Tensor | None]  # layer name -> mask as integers [blocks], None: dense


class MaskedModel:
    """A frozen model under learned masks: the logits, the masks drawn from them, and the step that
    moves both.

    model: its layers named in `masks` (bool `[out, in]`) are masked. Those named in `learned`
    (None: all of them) have logits; the others keep their mask, and with `keep_dense` their pruned
    weights are remembered for `use_dense`. Logits start as the paper's do, at C = `magnitude` where
    the mask keeps and 0 elsewhere; training/initialize.py has other starts. backend: see `Kernels`;
    microbatch: most sequences per forward pass.

    Memory beyond the model: the logits, one integer per block, and one scratch buffer as large as
    the largest layer. A layer's masked weight is written there when the forward pass reaches it.
    That is also when the layer's logits are updated and its next mask is drawn, in the same pass
    over the blocks. So `update` only notes the coefficient, and the next forward carries it out.

    A model that FSDP shards (models/sharding.py) has no scratch buffer: each process writes its own
    masked rows when they are about to be gathered. All processes must then run every forward and
    backward together.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        space: Space,
        magnitude: float = 10.0,
        logits_dtype: torch.dtype = torch.float32,
        learned: list[str] | None = None,
        seed: int = 0,
        backend: str = "compiled",
        keep_dense: bool = False,
        microbatch: int = 32,
    ):
        self.model = model
        self.space = space
        self.microbatch = microbatch
        self.seed = seed
        self.steps = 0  # key of the draws, together with the seed
        self.kernels = Kernels(space, backend)
        self.undo: list[Callable] = []  # called by `finish`
        self._override: Bits | None = None  # set by `use_masks`, replaces the masks drawn
        self._soft: dict[torch.device, Tensor] = {}  # set by `use_soft_masks`: 1 / temperature
        self._pruned: list[tuple[Tensor, Tensor]] = []  # other layers: weight, what m0 pruned
        if any(isinstance(module, MaskedLinear) for module in model.modules()):
            raise RuntimeError("the model has learned masks already: call `finish` first")
        modules = find_layers(model)
        learned = list(masks) if learned is None else learned
        for name in masks:
            if name not in learned:
                self._prune(modules[name], masks[name], keep_dense)
        scratch = scratch_buffers({name: modules[name] for name in learned})
        self.layers: dict[str, MaskedLayer] = {}
        for name in learned:
            weight = modules[name].weight.data
            buffer = scratch.get((weight.device, weight.dtype))
            layer = MaskedLayer(
                name, modules[name], masks[name], self.kernels, logits_dtype, buffer, self._fill
            )
            layer.set_logits_of_m0(magnitude)
            self.layers[name] = layer
        replace_modules(model, {layer.dense: layer.module for layer in self.layers.values()})
        if self.is_sharded:
            self.passes = ShardedPasses(model, self.layers)
            self.undo.append(self.passes.remove)
            # FSDP needs its first pass to run the whole model
            self.loss(torch.zeros(1, 2, dtype=torch.int64))

    def _prune(self, module: nn.Module, mask: Tensor, keep_dense: bool) -> None:
        """Mask the weight of a layer that is not learned."""
        weight = own_weight(module)
        pruned = ~Rows.of(module).own(mask).to(weight.device)
        if keep_dense:
            self._pruned.append((weight, weight.masked_fill(~pruned, 0.0)))
        weight.masked_fill_(pruned, 0.0)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards the layers."""
        return any(layer.sharded for layer in self.layers.values())

    def _fill(self, layer: MaskedLayer, out: Tensor | None = None) -> None:
        """Write the masked weight of a layer that a pass has reached to `out` (default: the scratch
        buffer)."""
        if layer.sharded:
            self.passes.note_written(layer)
        elif layer.used is layer.weight:  # `use_dense`
            return
        if layer.pending and self._override is None:
            layer.flush(out)
        else:
            self.write(layer, out)

    def write(self, layer: MaskedLayer, out: Tensor | None = None) -> None:
        """Write the weight that the layer uses now to `out`, `[rows * in]` (default: the scratch
        buffer)."""
        bits = layer.bits if self._override is None else self._override[layer.name]
        out = layer.scratch.view(-1) if out is None else out
        weight = layer.weight.view(-1)
        if bits is None:
            out.copy_(weight)
        elif self._soft and self._override is None:
            self.kernels.write_soft(layer.logits, weight, out, self._soft[weight.device])
        else:
            self.kernels.write(weight, bits, out)

    def rewrite(self, layer: MaskedLayer) -> None:
        """Make a pass that has just reached this layer use the mask that it has now. Only a sharded
        layer needs it, as FSDP has gathered its weight by then."""
        if not layer.sharded:
            return
        masked_rows = torch.empty_like(layer.weight)
        if len(masked_rows):
            self.write(layer, masked_rows.view(-1))
        set_gathered(layer, masked_rows)

    def flush(self) -> None:
        """Carry out the pending updates that no forward pass has reached."""
        for layer in self.layers.values():
            layer.flush()

    # ------------------------------------------------------------------------------------- learning

    def loss(self, batch: Tensor) -> float:
        """Return f(m * w, batch), in nats, for the mask in use, and carry out pending updates.
        batch: int64 `[sequences, tokens]`."""
        return batch_loss(self.model, batch, self.microbatch)

    def mean_loss(self, batches: Tensor) -> float:
        """Return the mean loss of minibatches, int64 `[minibatches, sequences, tokens]`. Each
        process runs a part of them; if the model is sharded, all run each one together."""
        batches = batches if self.is_sharded else processes.split(batches)
        losses = [self.loss(batch) for batch in batches]
        if self.is_sharded:
            # those of the main process, as others may be rounded differently
            return fmean(processes.all_gather(losses)[0])
        return processes.mean(losses)

    def keys(self, on_cpu: bool = False) -> dict[str, Tensor]:
        """Return the random keys of this step by layer name, on the layer's device or the CPU."""
        keys = layer_keys(self.seed, self.steps, len(self.layers))
        keys = {device: keys if on_cpu else keys.to(device) for device in self.devices()}
        return {
            name: keys[layer.weight.device][index]
            for index, (name, layer) in enumerate(self.layers.items())
        }

    def devices(self) -> set[torch.device]:
        """Return the devices of the learned layers."""
        return {layer.weight.device for layer in self.layers.values()}

    def _on_devices(self, number: float) -> dict[torch.device, Tensor]:
        """Return a number as float32 `[]` on each device of the learned layers."""
        return {
            device: torch.tensor(number, dtype=torch.float32, device=device)
            for device in self.devices()
        }

    def update(self, coefficient: float) -> None:
        """Schedule pi <- pi - coefficient * score(pi, m_t) and m_{t+1} ~ p(pi): the next forward
        does both, layer by layer. A coefficient of 0 only draws another mask."""
        self.flush()
        keys = self.keys(on_cpu=not self.kernels.is_fused)
        coefficients = self._on_devices(coefficient)
        for name, layer in self.layers.items():
            layer.schedule(coefficients[layer.weight.device], keys[name])
        self.steps += 1

    # --------------------------------------------------------------------------- which mask is used

    @contextmanager
    def use_masks(self, bits: Bits) -> Iterator[None]:
        """Mask the model by these `bits` within the context. No masks are drawn there."""
        self.flush()
        previous = self._override
        self._override = bits
        try:
            yield
        finally:
            self._override = previous

    @contextmanager
    def use_dense(self) -> Iterator[None]:
        """Use the dense weights within the context: those of the learned layers, without a copy,
        and with `keep_dense` those of the other layers."""
        unsharded = [layer for layer in self.layers.values() if not layer.sharded]
        with self.use_masks(dict.fromkeys(self.layers)):
            for layer in unsharded:
                layer.use(layer.weight)
            for weight, pruned in self._pruned:
                weight.add_(pruned)
            try:
                yield
            finally:
                for layer in unsharded:
                    layer.use(layer.scratch)
                for weight, pruned in self._pruned:
                    weight.sub_(pruned)

    @contextmanager
    def use_soft_masks(self, temperature: float) -> Iterator[None]:
        """Multiply each weight by its inclusion probability at logits / temperature within the
        context, in place of the mask. Masks stay hard if the temperature is 0."""
        self._soft = self._on_devices(1 / temperature) if temperature else {}
        try:
            yield
        finally:
            self._soft = {}

    def bits(self) -> dict[str, Tensor]:
        """Return a copy of each learned layer's present mask, as bits `[blocks]`: a quarter of a
        byte per weight at M = 4."""
        return {name: layer.bits.clone() for name, layer in self.layers.items()}

    def mode_bits(
        self, m0: dict[str, Tensor] | None = None, magnitude: float = 0.0
    ) -> dict[str, Tensor]:
        """Return the most probable mask of each learned layer, as bits `[blocks]`. If m0 is given,
        also as bits, it is the most probable mask of the logits less `magnitude` * m0."""
        self.flush()
        return {
            name: self.kernels.mode(layer.logits, m0[name] if m0 else None, magnitude)
            for name, layer in self.layers.items()
        }

    @property
    def blocks(self) -> int:
        """The number of blocks in all learned layers."""
        return sum(layer.shape.numel() for layer in self.layers.values()) // self.space.m

    def changed(self) -> float:
        """Return the share of blocks whose most probable mask is not m0's, from a sample."""
        self.flush()
        weights = sum(layer.changed() * layer.shape.numel() for layer in self.layers.values())
        return weights / self.space.m / self.blocks

    # -------------------------------------------------------------------------- saved and collected

    def broadcast_(self) -> None:
        """Copy the logits and masks of the main process to all, except those of sharded layers."""
        for _, layer, tensor in self._moving():
            if not layer.sharded:
                processes.broadcast_(tensor)

    def _moving(self) -> Iterator[tuple[str, MaskedLayer, Tensor]]:
        """Yield (name, layer, tensor) for all that learning changes: each layer's logits, plane by
        plane, and its mask."""
        for name, layer in self.layers.items():
            for i, plane in enumerate(layer.logits):
                yield f"logits.{i}.{name}", layer, plane
            yield f"bits.{name}", layer, layer.bits

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the state for a checkpoint: the step count, which keys the random numbers, and the
        tensors themselves, not copies."""
        self.flush()
        return {"steps": self.steps}, {
            name: layer.shard(tensor) for name, layer, tensor in self._moving()
        }

    def restore(self, scalars: dict, read: Callable[[str, Tensor], Tensor]) -> None:
        """Restore what `state` returned. read(name, like) returns the tensor of this name, of the
        size of `like`."""
        self.steps = scalars["steps"]
        for name, layer, tensor in self._moving():
            tensor.copy_(read(name, layer.shard(tensor)))

    def _collected(self, tensor_of: Callable[[MaskedLayer], Tensor]) -> dict[str, Tensor]:
        """Return layer name -> tensor_of(layer), on the CPU. All processes have to call this; only
        the main one gets the tensors, so no other needs room for them."""
        collected = {}
        for name, layer in self.layers.items():
            tensor = tensor_of(layer)
            if processes.is_main():
                collected[name] = tensor.cpu()
        return collected

    def masks_of(self, bits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return masks bool `[out, in]` by layer name, in the main process only."""
        return self._collected(lambda layer: layer.mask_of(layer.whole(bits[layer.name])))

    def whole_logits(self) -> dict[str, Tensor]:
        """Return logits `[width, blocks]` by layer name, in the main process only."""
        self.flush()
        return self._collected(
            lambda layer: torch.stack([layer.whole(plane) for plane in layer.logits])
        )

    def finish(self, bits: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Put the dense modules back, with their weights masked by `bits` (default: the most
        probable masks). Returns the masks as `masks_of` does."""
        bits = bits or self.mode_bits()
        for undo in self.undo:
            undo()
        replace_modules(self.model, {layer.module: layer.dense for layer in self.layers.values()})
        for name, layer in self.layers.items():
            layer.give_back(bits[name])
        return self.masks_of(bits)
