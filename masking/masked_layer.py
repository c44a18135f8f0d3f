"""One layer under a mask that is learned: its weight, its logits, its mask, and the module that
computes with them."""

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

SAMPLE = 4096  # blocks of a layer, at least, that changes are counted in, where it has so many


class MaskedLinear(nn.Linear):
    """Stands in a dense layer's place in the model while its mask is learned: y = (mask * W) x +
    bias.

        (q_proj): MaskedLinear(576, 576, 2:4)

    Its weight is a view of a buffer that layers share, which `fill` fills before each forward. With
    gradients, `with_gradients` computes the output of the layer and its input
    (training/straight_through.py).
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
    """One layer's weight, logits and mask, of those `rows` of it that this process has.

    dense: nn.Linear or Conv1D; mask: m0, bool `[out, in]`; scratch: as large as the largest layer,
    shared with others, of which the dense module's weight becomes a view. None for a layer that
    FSDP shards: FSDP sets the weight of the module that it has wrapped, so that one stays in its
    place, and `flush` fills what is sent.

    module: what the model calls: a MaskedLinear or, if FSDP shards the layer, the dense module
    itself.
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
        self.width = self.shape[1] // self.m  # blocks of a row
        self.bits = self.bits_of(mask)  # [blocks], m_t
        self.start = self.rows.begin * self.width  # the first block's number in the layer
        self.logits = [
            torch.empty(len(self.bits), dtype=logits_dtype, device=self.weight.device)
            for _ in range(kernels.space.width)
        ]  # planes [blocks]
        self.stride = max(1, len(self.bits) // SAMPLE)
        self.m0_sample = self.bits[:: self.stride].clone()
        self.pending = False  # whether an update is to be made when the next forward gets here
        fill = partial(fill, self)
        if self.sharded:
            self.module = dense
            MaskedRows.attach(dense, fill)
        else:
            self.module = MaskedLinear(self, fill)
            self.scratch = scratch[: self.shape.numel()].view(self.shape)
            self.use(self.scratch)

    def use(self, weight: Tensor) -> None:
        """Compute with this weight `[out, in]`: the scratch buffer, or the dense one. For layers
        that are not sharded.
        """
        self.used = weight
        self.module.weight = nn.Parameter(weight, requires_grad=False)
        self.set_dense(weight)

    def set_dense(self, weight: Tensor) -> None:
        """Make `[out, in]` the dense module's weight, in its layout."""
        weight = weight.T if is_transposed(self.dense) else weight
        self.dense.weight = nn.Parameter(weight, requires_grad=False)

    def changed(self) -> float:
        """The share of blocks whose most probable mask is not that of m0, of an evenly spaced
        sample of those that are here."""
        return float(
            (self.kernels.mode([plane[:: self.stride] for plane in self.logits]) != self.m0_sample)
            .float()
            .mean()
        )

    def set_logits(self, logits_of: Callable[[slice], Tensor]) -> None:
        """Set the logits, a chunk of blocks at a time: slice -> float32 `[blocks, width]`."""
        chunk = chunk_of(self.bits)
        for begin in range(0, len(self.bits), chunk):
            part = slice(begin, begin + chunk)
            for plane, column in zip(self.logits, logits_of(part).unbind(1)):
                plane[part] = column

    def set_logits_of_m0(self, magnitude: float) -> None:
        """Set the logits to the paper's start, C = `magnitude`, of the present mask."""
        space = self.kernels.space
        self.set_logits(lambda part: space.init(bits_to_mask(self.bits[part], self.m), magnitude))

    def schedule(self, coefficient: Tensor, key: Tensor) -> None:
        """Have the update made when the next forward gets here; coefficient and key as
        `Kernels.update` takes them."""
        self.pending = True
        self.coefficient = coefficient
        self.key = key

    def flush(self, out: Tensor | None = None) -> None:
        """Make the update that is pending, if one is. Its masked weight is in `out`, or the scratch
        buffer, then."""
        pending = self.pending
        self.pending = False
        if pending and len(self.bits):
            if out is None:
                out = (
                    torch.empty_like(self.weight).view(-1)
                    if self.sharded
                    else self.scratch.view(-1)
                )
            # coefficient and key are kept until the next: FSDP makes the pass on a stream of its
            # own
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
        """A number for each block of the layer, from those of this process; all processes have to
        ask at once."""
        return self.rows.whole(blocks, self.width)

    def shard(self, blocks: Tensor) -> Tensor:
        """This process's numbers, one a block, as a state has them: a DTensor where the layer is
        sharded."""
        return self.rows.shard(blocks, self.width)

    def bits_of(self, mask: Tensor) -> Tensor:
        """The layer's mask, bool `[out, in]`, as bits `[blocks]` of the rows that are here."""
        return mask_to_bits(self.rows.own(mask).reshape(-1, self.m).to(self.weight.device))

    def mask_of(self, bits: Tensor) -> Tensor:
        """The mask that `bits` `[blocks]` stand for, bool `[rows, in]`."""
        return bits_to_mask(bits, self.m).view(-1, self.shape[1])

    def give_back(self, bits: Tensor) -> None:
        """Mask the weight by these bits for good, and have the dense module use it."""
        self.weight.masked_fill_(~self.mask_of(bits), 0.0)
        if not self.sharded:
            self.set_dense(self.weight)
            self.dense.weight.data = self.dense.weight.data.contiguous()


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put `new[module]` wherever the model has one of these modules."""
    for parent in list(model.modules()):
        # named_children leaves out a module's second place
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def scratch_buffers(modules: dict[str, nn.Module]) -> dict[tuple, Tensor]:
    """(device, dtype) -> an empty tensor that is as large as the largest weight there that is not
    sharded."""
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
