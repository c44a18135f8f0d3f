"""A frozen model under masks that are learned: each layer's logits and mask, and when they move and are drawn."""
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from math import comb

import torch
from torch import Tensor, nn

import offload
import pge
import step
from layers import apply_masks, find_layers, is_transposed, match_masks, weight_matrix
from parallel import Part, Ranks
from planes import most_probable

SAMPLE = 4096  # blocks of a layer that `census` looks at, at least, where it has so many


class MaskedLayer:
    """One layer's weight, logits and mask. Its module's weight is a view of `scratch`, filled before each forward.

    With `ranks` the layer is shared out: its weight, logits, bits and all that is made of them are this process's rows
    of it, and `scratch` is gathered from all processes'.
    """

    def __init__(self, module: nn.Module, mask: Tensor, space, logits: list[Tensor], scratch: Tensor,
                 ranks: Ranks | None):
        self.module, self.m, self.ranks = module, space.m, ranks
        whole = weight_matrix(module)
        self.weight = own_rows(whole, ranks).to(scratch.device, copy=bool(ranks)).contiguous()  # [out, in], dense
        self.bits = step.mask_to_bits(own_rows(mask, ranks).reshape(-1, space.m).to(scratch.device))  # [blocks], m_t
        self.start = len(self.bits) * ranks.rank if ranks else 0  # the first block's number in the layer
        self.logits = logits  # `width` planes [blocks]
        self.scratch = scratch[:whole.numel()].view(whole.shape)
        self.written = own_rows(self.scratch, ranks).view(-1)  # of the scratch, what this process writes
        self.stride = max(1, len(self.bits) // SAMPLE)
        self.started = self.bits[::self.stride].clone()  # of m0, the blocks that `census` looks at
        self.pending = None  # (step, its last arguments) to be taken when the next forward gets here
        offload.set_weight(module, self.scratch.T if is_transposed(module) else self.scratch)

    def mask_of(self, bits: Tensor) -> Tensor:
        """The mask that `bits` `[blocks]` stand for, bool `[out, in]`."""
        return step.bits_to_mask(bits, self.m).view(-1, self.scratch.shape[1])

    def gather(self) -> None:
        """Have the others' rows in the scratch buffer beside one's own."""
        if self.ranks:
            self.ranks.join(self.written, self.scratch.view(-1))

    def whole(self, tensor: Tensor) -> Tensor:
        """A 1-D tensor of all rows, from one of this process's rows; all processes have to ask at once."""
        return self.ranks.join(tensor) if self.ranks else tensor

    def part(self, tensor: Tensor) -> Tensor | Part:
        """A 1-D tensor of this process's rows, as a state is saved and read."""
        return Part(tensor, self.ranks) if self.ranks else tensor


def own_rows(matrix: Tensor, ranks: Ranks | None) -> Tensor:
    """This process's rows of a layer's matrix; all of them where it is not shared out."""
    return matrix.chunk(ranks.count)[ranks.rank] if ranks else matrix


class MaskedModel:
    """A frozen model under masks that are learned: logits, the masks drawn from them, and the step that moves both.

    model: its layers named in `masks` (bool `[out, in]`) are masked; all of them if `learned` is None, else the named
    ones have logits and the rest keep their mask. Memory beside the model: the logits, one integer a block, and one
    scratch buffer as large as the largest layer, into which a layer's masked weight is written when the forward pass
    reaches it. That write is one pass together with the update of the layer's logits and the drawing of its next mask,
    so `update` only notes the coefficient and the following `forward` carries it out.

    ranks: shares each layer's rows out to these processes (those layers whose rows they divide), which then must run
    every forward and backward together: only one layer at a time is whole on any of them, in the scratch buffer.

    init: logits from the `mask`, from it and the weights' `scores` (name, weight `[out, in]` -> score `[out, in]`), or
    `random`; see the spaces' `init`.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], space, magnitude: float = 10.0, init: str = "mask",
                 logits_dtype: torch.dtype = torch.float32, learned: list[str] | None = None, seed: int = 0,
                 mode: str = "compiled", scores: Callable[[str, Tensor], Tensor] | None = None,
                 ranks: Ranks | None = None):
        self.model, self.space, self.seed, self.steps = model, space, seed, 0
        modules = find_layers(model, targets=[""])
        match_masks(modules, masks)
        learned = list(masks) if learned is None else learned
        apply_masks(modules, {name: mask for name, mask in masks.items() if name not in learned})
        self._step, self._draw = step.step_function(space, mode), step.draw_function(space, mode)
        self._samples_step = step.samples_function(space, mode)
        self._write = step.write_function(mode)
        self._drawn, self._first_drawn = None, None  # (step, number) of what `draw` drew; the step's first number
        self.initial = None  # bits of m0, kept only where the online baseline needs them
        sizes = Counter()
        for name in learned:
            weight = offload.weight_of(modules[name])
            device = ranks.device if ranks else weight.device
            sizes[device, weight.dtype] = max(sizes[device, weight.dtype], weight.numel())
        scratch = {key: torch.empty(size, dtype=key[1], device=key[0]) for key, size in sizes.items()}
        generator = torch.Generator().manual_seed(seed)
        self.layers: dict[str, MaskedLayer] = {}
        self._hooks = []
        for name in learned:
            module, mask = modules[name], masks[name]
            weight, sharing = weight_matrix(module), ranks if ranks and len(mask) % ranks.count == 0 else None
            device = ranks.device if ranks else weight.device
            chunks = mask.reshape(-1, space.m).split(step.CHUNK)
            if init == "random":
                started = [torch.randn(len(chunk), space.width, generator=generator) * magnitude for chunk in chunks]
                mask = torch.cat([space.mode(part) for part in started]).view_as(mask)
            elif init == "scores":
                parts = scores(name, weight.float()).cpu().reshape(-1, space.m).split(step.CHUNK)
                started = [space.init(chunk, magnitude, part) for chunk, part in zip(chunks, parts)]
            else:
                started = [space.init(chunk, magnitude) for chunk in chunks]
            logits = [torch.cat([part[:, i].to(device, logits_dtype) for part in started]) for i in range(space.width)]
            logits = [own_rows(plane.view(len(mask), -1), sharing).reshape(-1).clone() if sharing else plane
                      for plane in logits]
            self.layers[name] = MaskedLayer(module, mask, space, logits, scratch[device, weight.dtype], sharing)
            self._hooks.append(module.register_forward_pre_hook(self._before_forward(self.layers[name])))
        self._showing = {}  # layer -> bits shown instead of those drawn

    def _before_forward(self, layer: MaskedLayer):
        def hook(module, inputs):
            if layer.pending is not None and not self._showing:
                self._take_step(layer)
            else:
                self.write(layer)
        return hook

    def write(self, layer: MaskedLayer) -> None:
        """Write the layer's masked weight into the scratch buffer."""
        bits = self._showing.get(id(layer), layer.bits)
        if bits is None:
            layer.written.copy_(layer.weight.view(-1))
        else:
            write = self._write if self.steps else step.write_masked  # one pass is not worth a compilation
            write(layer.weight.view(-1), bits, layer.written, layer.m)
        layer.gather()

    def begin_at(self, layer: MaskedLayer, mask: Tensor, magnitude: float, score: Tensor) -> None:
        """Start a layer again from this mask and these scores `[blocks, M]`; its masked weight is written at once."""
        layer.bits.copy_(step.mask_to_bits(mask))
        for start in range(0, len(mask), step.CHUNK):
            part = slice(start, start + step.CHUNK)
            for plane, column in zip(layer.logits, self.space.init(mask[part], magnitude, score[part]).unbind(1)):
                plane[part] = column
        self.write(layer)

    def _take_step(self, layer: MaskedLayer) -> None:
        (take, *arguments), layer.pending = layer.pending, None
        take(layer.logits, layer.bits, layer.weight.view(-1), layer.written, *arguments, start=layer.start)
        layer.gather()

    def keys(self, steps: int | None = None, samples: list[int] = (0,)) -> dict[int, Tensor]:
        """Random keys of a step (default: this one) for its masks of these numbers, by the layer's id: int32
        `[samples, 2]` beside its weight."""
        steps = self.steps if steps is None else steps
        keys = torch.stack([step.layer_keys(self.seed, steps, len(self.layers), sample) for sample in samples], 1)
        keys = {device: keys.to(device) for device in {layer.weight.device for layer in self.layers.values()}}
        return {id(layer): keys[layer.weight.device][index] for index, layer in enumerate(self.layers.values())}

    def update(self, coefficient: float | list[float]) -> None:
        """pi <- pi - coefficient * score(pi, m_t), then m_{t+1} ~ p(pi): due in the next forward, layer by layer. A
        list is for the step's masks 0, 1, ..., as `draw` draws them."""
        if isinstance(coefficient, list):
            self._update_samples(coefficient)
            return
        self.flush()
        keys, coefficients = self.keys(), self._on_devices(coefficient)
        for layer in self.layers.values():
            layer.pending = self._step, coefficients[layer.weight.device], keys[id(layer)][0]
        self.steps += 1

    def _on_devices(self, values) -> dict[torch.device, Tensor]:
        devices = {layer.weight.device for layer in self.layers.values()}
        return {device: torch.tensor(values, dtype=torch.float32, device=device) for device in devices}

    def draw(self, sample: int | None) -> None:
        """The next forward wears this step's mask of that number, drawn from the logits as they are: any process can
        draw any of them. None: the mask that `update` has drawn."""
        if sample is None or self._drawn == (self.steps, sample):
            return
        if self._drawn is None or self._drawn[0] != self.steps:
            self._first_drawn = sample
        self.flush()
        keys = self.keys(samples=[sample])
        for layer in self.layers.values():
            layer.pending = self._draw, keys[id(layer)][0]
        self._drawn = self.steps, sample

    def _update_samples(self, coefficients: list[float]) -> None:
        """pi <- pi - sum_k coefficient_k * score(pi, m_k) over the step's masks 0, 1, ... as `draw` draws them. The
        next forward wears that mask of the next step that this process drew first in this one."""
        self.flush()
        following = self._first_drawn or 0
        drawn = self.keys(samples=range(len(coefficients)))
        after = self.keys(self.steps + 1, [0, following])  # 0: they must round alike in all processes
        values = self._on_devices(coefficients)
        for layer in self.layers.values():
            keys = torch.cat([drawn[id(layer)], after[id(layer)]])
            layer.pending = self._samples_step, values[layer.weight.device], keys
        self.steps += 1
        self._drawn = self.steps, following

    def next_step(self, redraw: bool) -> None:
        """Count a step whose logits have moved by themselves; `redraw`: m_{t+1} ~ p(pi), due in the next forward."""
        if redraw:
            keys = self.keys()
            for layer in self.layers.values():
                layer.pending = self._draw, keys[id(layer)][0]
        self.steps += 1

    def flush(self) -> None:
        """Carry out what `update` left due, where no forward pass did."""
        for layer in self.layers.values():
            if layer.pending is not None:
                self._take_step(layer)

    def keep_initial(self, masks: dict[str, Tensor]) -> None:
        """Remember m0 for `showing_initial`: a quarter of a byte a weight at M = 4."""
        self.initial = {id(layer): step.mask_to_bits(own_rows(masks[name], layer.ranks).reshape(-1, layer.m)
                                                     .to(layer.weight.device))
                        for name, layer in self.layers.items()}

    @contextmanager
    def showing_initial(self):
        """Inside, the model wears m0 (see `keep_initial`); the masks drawn are back afterwards."""
        with self.showing(self.initial):
            yield

    @contextmanager
    def showing_dense(self):
        """Inside, the learned layers wear no mask."""
        with self.showing(dict.fromkeys(map(id, self.layers.values()))):
            yield

    @contextmanager
    def showing(self, bits: dict[int, Tensor | None]):
        """Inside, the model wears the masks of these `bits` `[blocks]` (None: dense), by the layer's id, and none is
        drawn."""
        self.flush()
        self._showing = bits
        try:
            yield
        finally:
            self._showing = {}

    def mode_bits(self) -> dict[int, Tensor]:
        """The most probable mask of each learned layer, as bits `[blocks]`, by the layer's id."""
        self.flush()
        return {id(layer): torch.cat([self._mode(chunk) for chunk in zip(*(plane.split(step.CHUNK)
                                                                          for plane in layer.logits))])
                for layer in self.layers.values()}

    def _mode(self, planes: tuple[Tensor, ...]) -> Tensor:
        if isinstance(self.space, pge.LinearSpace):
            return most_probable([plane.float() for plane in planes], self.space.n).to(step.bits_dtype(self.space.m))
        return step.mask_to_bits(self.space.mode(torch.stack(planes, 1).float()))

    def census(self) -> dict[str, dict[str, float]]:
        """By layer name: `changed`, the share of blocks whose most probable mask is not the one they started from;
        `entropy` of their distributions, nats a block; `blocks`. From a sample of SAMPLE blocks a layer, evenly spaced
        over this process's rows."""
        self.flush()
        found = {"changed": {}, "entropy": {}, "blocks": {}}
        for name, layer in self.layers.items():
            planes = [plane[::layer.stride] for plane in layer.logits]
            found["changed"][name] = float((self._mode(planes) != layer.started).float().mean())
            every = -(-len(planes[0]) * comb(self.space.m, self.space.n) // 2**19)  # fewer blocks of many patterns
            probs = self.space.pattern_probs(torch.stack([plane[::every] for plane in planes], 1).float())
            found["entropy"][name] = float(torch.special.entr(probs).sum(1).mean())
            found["blocks"][name] = layer.scratch.numel() // layer.m
        return found

    def checksum(self) -> str:
        """A number that any change of the logits would change, in all likelihood: to compare processes by. Layers that
        are shared out have only one copy."""
        self.flush()
        sums = [plane.view(torch.int16 if plane.itemsize == 2 else torch.int32).sum(dtype=torch.int64)
                for layer in self.layers.values() for plane in layer.logits if not layer.ranks]
        return str([int(total) for total in sums])

    def _moving(self):
        """(name, layer, tensor) of what learning moves: each layer's logits, plane by plane, and the mask it wears."""
        for name, layer in self.layers.items():
            for i, plane in enumerate(layer.logits):
                yield f"logits.{i}.{name}", layer, plane
            yield f"bits.{name}", layer, layer.bits

    def state(self) -> tuple[dict, dict[str, Tensor | Part]]:
        """For a checkpoint: the count that random numbers are made from, and the tensors themselves, no copies."""
        self.flush()
        return {"steps": self.steps}, {name: layer.part(tensor) for name, layer, tensor in self._moving()}

    def restore(self, scalars: dict, read) -> None:
        self.steps = scalars["steps"]
        for name, layer, tensor in self._moving():
            tensor.copy_(read(name, layer.part(tensor)))

    def _collected(self, tensor_of) -> dict[str, Tensor]:
        """What a function makes of each layer, all processes together, on the CPU by the layer's name; of layers that
        are shared out, in the first process only: no other needs to have room for it."""
        found = {}
        for name, layer in self.layers.items():
            tensor = tensor_of(layer)
            if not layer.ranks or layer.ranks.first:
                found[name] = tensor.cpu()
        return found

    def masks_of(self, bits: dict[int, Tensor]) -> dict[str, Tensor]:
        """Masks bool `[out, in]`, as `_collected`."""
        return self._collected(lambda layer: layer.mask_of(layer.whole(bits[id(layer)])))

    def mode_masks(self) -> dict[str, Tensor]:
        """The most probable mask of each learned layer, bool `[out, in]`, as `_collected`."""
        return self.masks_of(self.mode_bits())

    def whole_logits(self) -> dict[str, Tensor]:
        """`[width, blocks]`, as `_collected`."""
        self.flush()
        return self._collected(lambda layer: torch.stack([layer.whole(plane) for plane in layer.logits]))

    def finish(self, bits: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """Give the modules back their own weights, masked by these `bits` (default: the mode); returns those masks. The
        weights of layers that are shared out are given back in the first process, on the CPU."""
        bits = bits or self.mode_bits()
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            weight = layer.weight.masked_fill_(~layer.mask_of(bits[id(layer)]), 0.0)
            if layer.ranks:
                weight = layer.whole(weight.view(-1)).view(layer.scratch.shape)
                weight = weight.cpu() if layer.ranks.first else weight.new_zeros(1).expand(weight.shape)
            offload.set_weight(layer.module, weight.T.contiguous() if is_transposed(layer.module) else weight)
        return self.masks_of(bits)
