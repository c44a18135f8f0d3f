"""One layer under a learned mask: its weight, logits and mask, and the module that computes with
them."""

from collections.abc import Callable
from functools import partial

from masking.block_bits import bits_to_mask, mask_to_bits
from masking.exact_kernels import chunk_of
from masking.kernels import Kernels
from models.layers import is_transposed, weight_matrix
from models.sharding import MaskedRows, Rows, own_weight

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SAMPLE = 4096  # least blocks of a layer in which changes are counted (all, if it has fewer)


class MaskedLinear(nn.Linear):
    """Replaces a dense layer in the model while its mask is learned: y = (mask * W) x + bias.

        (q_proj): MaskedLinear(576, 576, 2:4)

    Its weight is a view of a buffer that layers share. `fill` writes the masked weight there before
    each forward. If `with_gradients` is set and gradients are enabled, `with_gradients(layer, x)`
    computes the output (training/straight_through.py).
    """

    def __init__(self, layer: "MaskedLayer", fill: Callable[[], None]):
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.out_features, self.in_features = layer.shape
        self.layer = layer
        self.fill = fill
        self.with_gradients: Callable[[MaskedLayer, Tensor], Tensor] | None = None
        self.bias = layer.dense.bias

    def forward(self, x: Tensor) -> Tensor:
        self.fill()
        if self.with_gradients is None or not torch.is_grad_enabled():
            return self.layer.dense.forward(x)
        return self.with_gradients(self.layer, x)

    def extra_repr(self) -> str:
        space = self.layer.kernels.space
        return f"{self.in_features}, {self.out_features}, {space.n}:{space.m}"


class MaskedLayer:
    """The weight, logits and mask of those rows of a layer that this process has.

    dense: nn.Linear or Conv1D; mask: m0, bool `[out, in]`; scratch: a buffer as large as the
    largest layer, shared by layers. The dense module's weight becomes a view of it. scratch is None
    if FSDP shards the layer: FSDP sets the weight of the module that it has wrapped, so the dense
    module stays in the model, and `fill` writes what FSDP sends.

    module: the module in the model: a MaskedLinear or, if FSDP shards the layer, the dense module.
    """

    def __init__(
        self,
        name: str,
        dense: nn.Module,
        mask: Tensor,
        kernels: Kernels,
        logits_dtype: torch.dtype,
        scratch: Tensor | None,
        fill: Callable[..., None],
    ):
        self.name = name
        self.dense = dense
        self.rows = Rows.of(dense)
        self.kernels = kernels
        self.m = kernels.space.m
        self.shape = torch.Size(weight_matrix(dense).shape)
        self.sharded = scratch is None
        self.weight = own_weight(dense).contiguous()  # [rows, in], dense
        self.width = self.shape[1] // self.m  # blocks per row
        self.bits = self.bits_of(mask)  # [blocks], m_t
        self.start = self.rows.begin * self.width  # the first block's number in the layer
        self.logits = [
            torch.empty(len(self.bits), dtype=logits_dtype, device=self.weight.device)
            for _ in range(kernels.space.width)
        ]  # planes [blocks]
        self.stride = max(1, len(self.bits) // SAMPLE)
        self.m0_sample = self.bits[:: self.stride].clone()
        self.pending = False  # whether the next forward has to make an update
        fill = partial(fill, self)
        if self.sharded:
            self.module = dense
            MaskedRows.attach(dense, fill)
        else:
            self.module = MaskedLinear(self, fill)
            self.scratch = scratch[: self.shape.numel()].view(self.shape)
            self.use(self.scratch)

    def use(self, weight: Tensor) -> None:
        """Compute with this weight `[out, in]`: the scratch buffer, or the dense weight. The layer
        must not be sharded."""
        self.used = weight
        self.module.weight = nn.Parameter(weight, requires_grad=False)
        self.set_dense(weight)

    def set_dense(self, weight: Tensor) -> None:
        """Set the dense module's weight to this one, `[out, in]`, in the module's layout."""
        weight = weight.T if is_transposed(self.dense) else weight
        self.dense.weight = nn.Parameter(weight, requires_grad=False)

    def changed(self) -> float:
        """Return the share of blocks whose most probable mask is not m0's, in an evenly spaced
        sample of this process's blocks."""
        return float(
            (self.kernels.mode([plane[:: self.stride] for plane in self.logits]) != self.m0_sample)
            .float()
            .mean()
        )

    def checksum(self) -> list[int]:
        """Return numbers that almost surely change with any change of the logits."""
        integer = torch.int16 if self.logits[0].itemsize == 2 else torch.int32
        return [int(plane.view(integer).sum(dtype=torch.int64)) for plane in self.logits]

    def set_logits(self, logits_of: Callable[[slice], Tensor]) -> None:
        """Set the logits, a chunk of blocks at a time. logits_of: slice -> float32 `[blocks,
        width]`."""
        chunk = chunk_of(self.bits)
        for begin in range(0, len(self.bits), chunk):
            part = slice(begin, begin + chunk)
            for plane, column in zip(self.logits, logits_of(part).unbind(1)):
                plane[part] = column

    def set_logits_of_m0(self, magnitude: float) -> None:
        """Set the logits to the paper's initial ones for the present mask, with C = `magnitude`."""
        space = self.kernels.space
        self.set_logits(lambda part: space.init(bits_to_mask(self.bits[part], self.m), magnitude))

    def schedule(self, coefficient: Tensor, key: Tensor) -> None:
        """Schedule an update for the next forward. coefficient and key: see `Kernels.update`."""
        self.pending = True
        self.coefficient = coefficient
        self.key = key

    def flush(self, out: Tensor | None = None) -> None:
        """Make the pending update, if there is one, and write the masked weight to `out` (default:
        the scratch buffer, or nowhere if the layer is sharded)."""
        pending = self.pending
        self.pending = False
        if pending and len(self.bits):
            if out is None:
                out = (
                    torch.empty_like(self.weight).view(-1)
                    if self.sharded
                    else self.scratch.view(-1)
                )
            # self keeps coefficient and key until the next update, as FSDP runs this on its own
            # stream
            self.kernels.update(
                self.logits,
                self.bits,
                self.weight.view(-1),
                out,
                self.coefficient,
                self.key,
                self.start,
            )

    def whole(self, blocks: Tensor) -> Tensor:
        """Gather one number per block of the layer from all processes, which have to call this at
        the same time."""
        return self.rows.whole(blocks, self.width)

    def shard(self, blocks: Tensor) -> Tensor:
        """Return this process's numbers, one per block, as checkpoints have them: a DTensor if the
        layer is sharded."""
        return self.rows.shard(blocks, self.width)

    def bits_of(self, mask: Tensor) -> Tensor:
        """Pack the layer's mask, bool `[out, in]`, into bits `[blocks]` of this process's rows."""
        return mask_to_bits(self.rows.own(mask).reshape(-1, self.m).to(self.weight.device))

    def mask_of(self, bits: Tensor) -> Tensor:
        """Unpack bits `[blocks]` into a mask, bool `[rows, in]`."""
        return bits_to_mask(bits, self.m).view(-1, self.shape[1])

    def give_back(self, bits: Tensor) -> None:
        """Mask the weight by these bits for good, and give it back to the dense module."""
        self.weight.masked_fill_(~self.mask_of(bits), 0.0)
        if not self.sharded:
            self.set_dense(self.weight)
            self.dense.weight.data = self.dense.weight.data.contiguous()


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Replace each of these modules by `new[module]`, wherever the model has it."""
    for parent in list(model.modules()):
        # named_children would skip the second occurrence of a module
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def scratch_buffers(modules: dict[str, nn.Module]) -> dict[tuple, Tensor]:
    """Return (device, dtype) -> an uninitialized tensor of the size of the largest such weight that
    is not sharded."""
    weights = [
        module.weight.data
        for module in modules.values()
        if not isinstance(module.weight.data, DTensor)
    ]
    largest = {
        (weight.device, weight.dtype): weight.numel()
        for weight in sorted(weights, key=Tensor.numel)
    }
    return {key: torch.empty(size, dtype=key[1], device=key[0]) for key, size in largest.items()}
