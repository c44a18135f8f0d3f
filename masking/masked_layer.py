"""One layer under a mask that is learned: its weight, its logits, its mask, and the buffer that it computes from."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from masking import offload
from masking.block_bits import bits_to_mask, mask_to_bits
from masking.distributed import ProcessGroup, Shard
from masking.exact_kernels import chunk_of
from masking.kernels import Kernels
from masking.layers import is_transposed, weight_matrix

SAMPLE = 4096  # blocks of a layer, at least, that statistics are taken from, where it has so many


def own_rows(matrix: Tensor, group: ProcessGroup | None) -> Tensor:
    """This process's rows of a layer's matrix; all of them where it is not sharded."""
    return matrix.chunk(group.size)[group.rank] if group else matrix


class MaskedLayer:
    """One layer's weight, logits and mask. Its module's weight is a view of `scratch`, filled before each forward.

    module: nn.Linear or Conv1D; mask: m0, bool `[out, in]`; scratch: as large as the largest layer, shared with others.
    With a `group` the layer is sharded: its weight, logits, bits and all that is made of them are this process's rows
    of it, and `scratch` is gathered from all processes'.
    """

    def __init__(self, name: str, module: nn.Module, mask: Tensor, kernels: Kernels, logits_dtype: torch.dtype,
                 scratch: Tensor, group: ProcessGroup | None):
        self.name, self.module, self.group = name, module, group
        self.kernels, self.m = kernels, kernels.space.m
        whole = weight_matrix(module)
        device = scratch.device
        self.weight = own_rows(whole, group).to(device, copy=bool(group)).contiguous()  # [out, in], dense
        blocks = own_rows(mask, group).reshape(-1, self.m)
        self.bits = mask_to_bits(blocks.to(device))  # [blocks], m_t
        self.start = len(self.bits) * group.rank if group else 0  # the first block's number in the layer
        self.logits = [torch.empty(len(self.bits), dtype=logits_dtype, device=device)
                       for _ in range(kernels.space.width)]  # planes [blocks]
        self.scratch = scratch[:whole.numel()].view(whole.shape)
        self.written = own_rows(self.scratch, group).view(-1)  # of the scratch, what this process writes
        self.stride = max(1, len(self.bits) // SAMPLE)
        self.remember_start()
        self.pending: Callable[[], None] | None = None  # the pass to be made when the next forward gets here
        offload.set_weight(module, self.scratch.T if is_transposed(module) else self.scratch)

    def remember_start(self) -> None:
        """Compare with the present mask in statistics, on a sample of the blocks."""
        self.start_sample = self.bits[::self.stride].clone()

    def set_logits(self, logits_of: Callable[[slice], Tensor]) -> None:
        """Set the logits, a chunk of blocks at a time: slice -> float32 `[blocks, width]`."""
        chunk = chunk_of(self.bits)
        for begin in range(0, len(self.bits), chunk):
            part = slice(begin, begin + chunk)
            for plane, column in zip(self.logits, logits_of(part).unbind(1)):
                plane[part] = column

    def write(self, bits: Tensor | None, once: bool = False) -> None:
        """Write the weight masked by these bits (None: dense) into the scratch buffer. `once`: it is the only time."""
        if bits is None:
            self.written.copy_(self.weight.view(-1))
        else:
            self.kernels.write(self.weight.view(-1), bits, self.written, once)
        self._gather()

    def schedule(self, kernel: Callable, *arguments: Tensor) -> None:
        """Have a pass of `kernels` made when the next forward gets here: its arguments after weight and out."""
        self.pending = lambda: kernel(self.logits, self.bits, self.weight.view(-1), self.written, *arguments,
                                      start=self.start)

    def flush(self) -> None:
        """Make the pass that is pending, if one is. Its masked weight is in the scratch buffer then."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending()
            self._gather()

    def _gather(self) -> None:
        """Have the others' rows in the scratch buffer beside one's own."""
        if self.group:
            self.group.all_gather_tensor(self.written, self.scratch.view(-1))

    def whole(self, tensor: Tensor) -> Tensor:
        """A 1-D tensor of all rows, from one of this process's rows; all processes have to ask at once."""
        return self.group.all_gather_tensor(tensor) if self.group else tensor

    def shard(self, tensor: Tensor) -> Tensor | Shard:
        """A 1-D tensor of this process's rows, as a state is saved and read."""
        return Shard(tensor, self.group) if self.group else tensor

    def mask_of(self, bits: Tensor) -> Tensor:
        """The mask that `bits` `[blocks]` stand for, bool `[out, in]`."""
        return bits_to_mask(bits, self.m).view(-1, self.scratch.shape[1])

    def give_back(self, bits: Tensor) -> None:
        """Give the module its own weight back, masked by these bits; of a sharded layer in the main process, on the
        CPU."""
        weight = self.weight.masked_fill_(~self.mask_of(bits), 0.0)
        if self.group:
            weight = self.whole(weight.view(-1)).view(self.scratch.shape)
            weight = weight.cpu() if self.group.is_main else weight.new_zeros(1).expand(weight.shape)
        offload.set_weight(self.module, weight.T.contiguous() if is_transposed(self.module) else weight)
