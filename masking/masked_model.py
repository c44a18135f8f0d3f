"""A frozen model under masks that are learned: when its logits move, when its masks are drawn,
which mask it uses."""

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
    """A frozen model under masks that are learned: logits, the masks drawn from them, and the step
    that moves both.

    model: its layers named in `masks` (bool `[out, in]`) are masked; all of them if `learned` is
    None, else the named ones have logits and the rest keep their mask; what that takes from them is
    remembered for `use_dense` where `keep_dense` asks for it. Logits start at C = `magnitude` where
    the mask keeps and 0 elsewhere, as the paper's do; training/initialize.py has other starts.
    backend: of `Kernels`; microbatch: sequences in one forward pass, at most.

    Memory beside the model: the logits, one integer a block, and one scratch buffer as large as the
    largest layer, into which a layer's masked weight is written when the forward pass reaches it.
    That write is one pass together with the update of the layer's logits and the drawing of its
    next mask, so `update` only notes the coefficient and the following `forward` carries it out.

    A model that FSDP shards (models/sharding.py) has no scratch buffer: each process writes its own
    masked rows when they are about to be gathered. All processes then must run every forward and
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
        self.steps = 0  # by which draws are keyed, with the seed
        self.kernels = Kernels(space, backend)
        self.undo: list[Callable] = []  # for `finish`
        self._instead: Bits | None = None  # used, by `use_masks`, instead of the masks drawn
        self._pruned: list[tuple[Tensor, Tensor]] = []  # weights of other layers; what m0 took
        if any(isinstance(module, MaskedLinear) for module in model.modules()):
            raise RuntimeError("the model is under learned masks already: finish them first")
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
            # FSDP wants its first pass to be of the whole model
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
        """Whether FSDP shares the layers out to several processes."""
        return any(layer.sharded for layer in self.layers.values())

    def _fill(self, layer: MaskedLayer, out: Tensor | None = None) -> None:
        """A pass has reached this layer: have its masked weight in `out`, or the scratch buffer."""
        if layer.sharded:
            self.passes.note_written(layer)
        elif layer.used is layer.weight:  # `use_dense`
            return
        if layer.pending and self._instead is None:
            layer.flush(out)
        else:
            self.write(layer, out)

    def write(self, layer: MaskedLayer, out: Tensor | None = None) -> None:
        """Write the weight that the layer uses now into `out`, `[rows * in]`, or the scratch
        buffer."""
        bits = layer.bits if self._instead is None else self._instead[layer.name]
        out = layer.scratch.view(-1) if out is None else out
        if bits is None:
            out.copy_(layer.weight.view(-1))
        else:
            self.kernels.write(layer.weight.view(-1), bits, out)

    def rewrite(self, layer: MaskedLayer) -> None:
        """In a pass that has just reached this layer: have it use the mask that it has now. Only
        FSDP has gathered the weight by then."""
        if not layer.sharded:
            return
        own = torch.empty_like(layer.weight)
        if len(own):
            self.write(layer, own.view(-1))
        set_gathered(layer, own)

    def flush(self) -> None:
        """Carry out what `update` left due, where no forward pass did."""
        for layer in self.layers.values():
            layer.flush()

    # ------------------------------------------------------------------------------------- learning

    def loss(self, batch: Tensor) -> float:
        """f(m * w, batch), nats, of the mask in use; batch int64 `[sequences, tokens]`. It carries
        out what is due."""
        return batch_loss(self.model, batch, self.microbatch)

    def mean_loss(self, batches: Tensor) -> float:
        """The mean loss of minibatches, int64 `[minibatches, sequences, tokens]`. Each process runs
        its part of them; of a sharded model all run each one together."""
        losses = [
            self.loss(batch) for batch in (batches if self.is_sharded else processes.split(batches))
        ]
        if self.is_sharded:
            # the main process's, lest rounding tells them apart
            return fmean(processes.all_gather(losses)[0])
        return processes.mean(losses)

    def keys(self, on_cpu: bool = False) -> dict[str, Tensor]:
        """Random keys of this step, by the layer's name, each beside its weight or on the CPU."""
        keys = layer_keys(self.seed, self.steps, len(self.layers))
        keys = {device: keys if on_cpu else keys.to(device) for device in self.devices()}
        return {
            name: keys[layer.weight.device][index]
            for index, (name, layer) in enumerate(self.layers.items())
        }

    def devices(self) -> set[torch.device]:
        """Where the learned layers are."""
        return {layer.weight.device for layer in self.layers.values()}

    def update(self, coefficient: float) -> None:
        """pi <- pi - coefficient * score(pi, m_t), then m_{t+1} ~ p(pi): due in the next forward,
        layer by layer. With 0 another mask is drawn, no more."""
        self.flush()
        keys = self.keys(on_cpu=not self.kernels.is_fused)
        coefficients = {
            device: torch.tensor(coefficient, dtype=torch.float32, device=device)
            for device in self.devices()
        }
        for name, layer in self.layers.items():
            layer.schedule(coefficients[layer.weight.device], keys[name])
        self.steps += 1

    # --------------------------------------------------------------------------- which mask is used

    @contextmanager
    def use_masks(self, bits: Bits) -> Iterator[None]:
        """Inside, the model is masked by these `bits`, and none is drawn."""
        self.flush()
        before = self._instead
        self._instead = bits
        try:
            yield
        finally:
            self._instead = before

    @contextmanager
    def use_dense(self) -> Iterator[None]:
        """Inside, the layers have no mask: the learned ones compute with their own weights, of
        which nothing is copied; the others too where `keep_dense` was asked for."""
        own = [layer for layer in self.layers.values() if not layer.sharded]
        with self.use_masks(dict.fromkeys(self.layers)):
            for layer in own:
                layer.use(layer.weight)
            for weight, pruned in self._pruned:
                weight.add_(pruned)
            try:
                yield
            finally:
                for layer in own:
                    layer.use(layer.scratch)
                for weight, pruned in self._pruned:
                    weight.sub_(pruned)

    def bits(self) -> dict[str, Tensor]:
        """A copy of each learned layer's mask as it is, as bits `[blocks]`: a quarter of a byte a
        weight at M = 4."""
        return {name: layer.bits.clone() for name, layer in self.layers.items()}

    def mode_bits(
        self, m0: dict[str, Tensor] | None = None, magnitude: float = 0.0
    ) -> dict[str, Tensor]:
        """The most probable mask of each learned layer, as bits `[blocks]`; where m0, such bits, is
        given, that of the logits less `magnitude` * m0."""
        self.flush()
        return {
            name: self.kernels.mode(layer.logits, m0[name] if m0 else None, magnitude)
            for name, layer in self.layers.items()
        }

    @property
    def blocks(self) -> int:
        """How many blocks all learned layers have."""
        return sum(layer.shape.numel() for layer in self.layers.values()) // self.space.m

    def changed(self) -> float:
        """The share of blocks whose most probable mask is not that of m0."""
        self.flush()
        return (
            sum(layer.changed() * layer.shape.numel() for layer in self.layers.values())
            / self.space.m
            / self.blocks
        )

    # -------------------------------------------------------------------------- saved and collected

    def checksum(self) -> str:
        """A number that any change of the logits would change, in all likelihood: to compare
        processes by. Layers that are sharded have only one copy."""
        self.flush()
        sums = [
            plane.view(torch.int16 if plane.itemsize == 2 else torch.int32).sum(dtype=torch.int64)
            for layer in self.layers.values()
            for plane in layer.logits
            if not layer.sharded
        ]
        return str([int(total) for total in sums])

    def broadcast_(self) -> None:
        """Take the logits and masks of the main process, but for layers that are sharded."""
        for _, layer, tensor in self._moving():
            if not layer.sharded:
                processes.broadcast_(tensor)

    def _moving(self) -> Iterator[tuple[str, MaskedLayer, Tensor]]:
        """(name, layer, tensor) of what learning moves: each layer's logits, plane by plane, and
        its mask."""
        for name, layer in self.layers.items():
            for i, plane in enumerate(layer.logits):
                yield f"logits.{i}.{name}", layer, plane
            yield f"bits.{name}", layer, layer.bits

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """For a checkpoint: the count that random numbers are made from, and the tensors
        themselves, no copies."""
        self.flush()
        return {"steps": self.steps}, {
            name: layer.shard(tensor) for name, layer, tensor in self._moving()
        }

    def restore(self, scalars: dict, read: Callable[[str, Tensor], Tensor]) -> None:
        """From `state`; read(name, like): the tensor of this name, as large as `like`."""
        self.steps = scalars["steps"]
        for name, layer, tensor in self._moving():
            tensor.copy_(read(name, layer.shard(tensor)))

    def _collected(self, tensor_of: Callable[[MaskedLayer], Tensor]) -> dict[str, Tensor]:
        """What a function makes of each layer, all processes together, on the CPU by the layer's
        name; in the main process only: no other needs to have room for it."""
        found = {}
        for name, layer in self.layers.items():
            tensor = tensor_of(layer)
            if processes.is_main():
                found[name] = tensor.cpu()
        return found

    def masks_of(self, bits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masks bool `[out, in]`, as `_collected`."""
        return self._collected(lambda layer: layer.mask_of(layer.whole(bits[layer.name])))

    def whole_logits(self) -> dict[str, Tensor]:
        """`[width, blocks]`, as `_collected`."""
        self.flush()
        return self._collected(
            lambda layer: torch.stack([layer.whole(plane) for plane in layer.logits])
        )

    def finish(self, bits: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Put the dense modules back, their weights masked by these `bits` (default: the mode);
        returns those masks, as `_collected`."""
        bits = bits or self.mode_bits()
        for undo in self.undo:
            undo()
        replace_modules(self.model, {layer.module: layer.dense for layer in self.layers.values()})
        for name, layer in self.layers.items():
            layer.give_back(bits[name])
        return self.masks_of(bits)
