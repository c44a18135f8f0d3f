"""One layer under a mask that is learned: its weight, its logits, its mask, and what it computes from."""
from collections.abc import Callable

from masking.block_bits import bits_to_mask, mask_to_bits
from masking.exact_kernels import chunk_of
from masking.kernels import Kernels
from models.layers import is_transposed, weight_matrix
from models.sharding import Rows, own_weight

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SAMPLE = 4096  # blocks of a layer, at least, that changes are counted in, where it has so many


class MaskedLayer:
    """One layer's weight, logits and mask, of those `rows` of it that this process has.

    module: nn.Linear or Conv1D; mask: m0, bool `[out, in]`; scratch: as large as the largest layer, shared with others,
    of which the module's weight becomes a view, to be filled before each forward. None for a layer that FSDP shards:
    the module keeps its weight, and `write` and `flush` fill what is sent.
    """

    def __init__(self, name: str, module: nn.Module, mask: Tensor, kernels: Kernels, logits_dtype: torch.dtype,
                 scratch: Tensor | None):
        self.name, self.module, self.rows = name, module, Rows.of(module)
        self.kernels, self.m = kernels, kernels.space.m
        self.shape, self.sharded = torch.Size(weight_matrix(module).shape), scratch is None
        self.weight = own_weight(module).contiguous()  # [rows, in], dense
        self.width = self.shape[1] // self.m  # blocks of a row
        self.bits = self.bits_of(mask)  # [blocks], m_t
        self.start = self.rows.begin * self.width  # the first block's number in the layer
        self.logits = [torch.empty(len(self.bits), dtype=logits_dtype, device=self.weight.device)
                       for _ in range(kernels.space.width)]  # planes [blocks]
        self.stride = max(1, len(self.bits) // SAMPLE)
        self.m0_sample = self.bits[::self.stride].clone()
        self.pending = False  # whether an update is to be made when the next forward gets here
        self.scratch = None if self.sharded else scratch[:self.shape.numel()].view(self.shape)
        if not self.sharded:
            self.use(self.scratch)

    def use(self, weight: Tensor) -> None:
        """Have the module, which is not sharded, compute with this weight `[out, in]`: the scratch buffer, or the dense
        one."""
        self.used = weight
        weight = weight.T if is_transposed(self.module) else weight
        self.module.weight = nn.Parameter(weight, requires_grad=False)

    def changed(self) -> float:
        """The share of blocks whose most probable mask is not that of m0, of an evenly spaced sample of
        those that are here."""
        return float((self.kernels.mode([plane[::self.stride] for plane in self.logits]) != self.m0_sample
                      ).float().mean())

    def set_logits(self, logits_of: Callable[[slice], Tensor]) -> None:
        """Set the logits, a chunk of blocks at a time: slice -> float32 `[blocks, width]`."""
        chunk = chunk_of(self.bits)
        for begin in range(0, len(self.bits), chunk):
            part = slice(begin, begin + chunk)
            for plane, column in zip(self.logits, logits_of(part).unbind(1)):
                plane[part] = column

    def schedule(self, coefficient: Tensor, key: Tensor) -> None:
        """Have the update made when the next forward gets here; coefficient and key as `Kernels.update` takes them."""
        self.pending, self.coefficient, self.key = True, coefficient, key

    def flush(self, out: Tensor | None = None) -> None:
        """Make the update that is pending, if one is. Its masked weight is in `out`, or the scratch buffer, then."""
        pending, self.pending = self.pending, False
        if pending and len(self.bits):
            if out is None:
                out = torch.empty_like(self.weight).view(-1) if self.sharded else self.scratch.view(-1)
            # coefficient and key are kept until the next: FSDP makes the pass on a stream of its own
            self.kernels.update(self.logits, self.bits, self.weight.view(-1), out, self.coefficient, self.key,
                                self.start)

    def whole(self, blocks: Tensor) -> Tensor:
        """A number for each block of the layer, from those of this process; all processes have to ask at once."""
        return self.rows.whole(blocks, self.width)

    def shard(self, blocks: Tensor) -> Tensor:
        """This process's numbers, one a block, as a state has them: a DTensor where the layer is sharded."""
        return self.rows.shard(blocks, self.width)

    def bits_of(self, mask: Tensor) -> Tensor:
        """The layer's mask, bool `[out, in]`, as bits `[blocks]` of the rows that are here."""
        return mask_to_bits(self.rows.own(mask).reshape(-1, self.m).to(self.weight.device))

    def mask_of(self, bits: Tensor) -> Tensor:
        """The mask that `bits` `[blocks]` stand for, bool `[rows, in]`."""
        return bits_to_mask(bits, self.m).view(-1, self.shape[1])

    def give_back(self, bits: Tensor) -> None:
        """Mask the weight by these bits for good, and have the module use it."""
        self.weight.masked_fill_(~self.mask_of(bits), 0.0)
        if not self.sharded:
            weight = self.weight.T.contiguous() if is_transposed(self.module) else self.weight
            self.module.weight = nn.Parameter(weight, requires_grad=False)


def scratch_buffers(modules: dict[str, nn.Module]) -> dict[tuple, Tensor]:
    """(device, dtype) -> an empty tensor that is as large as the largest weight there that is not sharded."""
    weights = [module.weight.data for module in modules.values() if not isinstance(module.weight.data, DTensor)]
    largest = {(weight.device, weight.dtype): weight.numel() for weight in sorted(weights, key=Tensor.numel)}
    return {key: torch.empty(size, dtype=key[1], device=key[0]) for key, size in largest.items()}
