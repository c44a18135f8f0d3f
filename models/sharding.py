"""Shards a model's layers over all processes with PyTorch's FSDP2
(torch.distributed.fsdp.fully_shard).

Each process stores a chunk of the rows of every projection. FSDP gathers a decoder layer when a
pass reaches it, and frees it afterwards. FSDP asks a tensor subclass what to send: `MaskedRows`
computes the masked rows of its own chunk at that moment. So only masked weights are sent, and only
the process that owns a row needs its logits. Every process has all embeddings, norms, biases and
the head.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from models.layers import decoder_layers, find_layers, is_transposed, weight_matrix
from utils import UserError

import torch
from torch import Tensor, distributed, nn
from torch.distributed import device_mesh, fsdp
from torch.distributed.tensor import DTensor, Shard

# since torch 2.13; in earlier versions, if the text of some processes does not reach an expert, its
# gradients are mixed with others
REDUCES_UNUSED = hasattr(fsdp.FSDPModule, "set_reduce_scatter_unused_params")


def check_version() -> None:
    """Raise UserError if torch's FSDP is too old."""
    if "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters:
        raise UserError(
            f"--shard needs torch 2.8 or newer and this is {torch.__version__}: install a newer "
            "one, or leave --shard out"
        )


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Shard the projections of a model on the meta device over all processes, and allocate its
    tensors on `device`.

    The parameters have no values yet. Raises UserError for layers of type Conv1D (GPT-2), whose
    outputs are columns.
    """
    if any(map(is_transposed, model.modules())):
        raise UserError(
            "--shard splits nn.Linear by rows, and this model has Conv1D: leave --shard out"
        )
    model.requires_grad_(False)
    projections = find_layers(model).values()
    layers = decoder_layers(model)
    weights = {module.weight for module in projections}
    inside = {part for layer in layers for part in layer.modules()}
    options = {
        "mesh": device_mesh.init_device_mesh(device.type, (processes,)),
        "reshard_after_forward": True,
        "ignored_params": {
            parameter for parameter in model.parameters() if parameter not in weights
        },
    }
    # projections outside of the decoder's layers are sharded one by one, because swaps call only
    # parts of the model
    for module in [*layers, *(module for module in projections if module not in inside), model]:
        fsdp.fully_shard(module, **options)
        if REDUCES_UNUSED:
            module.set_reduce_scatter_unused_params(True)
    model._apply(
        lambda tensor: (
            torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        )
    )
    model.tie_weights()


def most_rows(tensor: DTensor) -> int:
    """Return the largest number of rows of a tensor that a process has. FSDP splits rows as
    torch.chunk does, so the last processes may have fewer, or none."""
    return -(-tensor.shape[0] // tensor.device_mesh.size())


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the range of rows, (begin, end), that this process has of a tensor: all of them unless
    it is a DTensor."""
    count = tensor.shape[0]
    if not isinstance(tensor, DTensor):
        return 0, count
    rows_per_process = most_rows(tensor)
    rank = tensor.device_mesh.get_local_rank()
    return min(count, rows_per_process * rank), min(count, rows_per_process * (rank + 1))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor: a DTensor is gathered from all processes, which have to call this at
    the same time; any other tensor is returned as it is.

    DTensor.full_tensor is not used: its asynchronous collectives have crashed a process under gloo
    (torch 2.13).
    """
    if not isinstance(tensor, DTensor):
        return tensor
    part = tensor.to_local().detach()
    mesh = tensor.device_mesh
    padded = part.new_zeros(most_rows(tensor), *part.shape[1:])
    padded[: len(part)] = part
    gathered = part.new_empty(mesh.size(), *padded.shape)
    distributed.all_gather(list(gathered), padded, group=mesh.get_group())
    return gathered.flatten(0, 1)[: tensor.shape[0]]


@dataclass
class Rows:
    """The rows of a layer's weight that this process has: `begin` to `end` of `count`. It has all
    rows if `mesh` is None."""

    count: int
    begin: int
    end: int
    mesh: device_mesh.DeviceMesh | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Rows":
        """Return the rows that this process has of a layer's weight."""
        weight = weight_matrix(module)
        return cls(
            weight.shape[0],
            *own_rows(weight),
            weight.device_mesh if isinstance(weight, DTensor) else None,
        )

    def own(self, matrix: Tensor) -> Tensor:
        """Return this process's part of a tensor with all rows, `[count, ...]`."""
        return matrix[self.begin : self.end]

    def shard(self, part: Tensor, width: int) -> Tensor:
        """Return this process's part of a tensor, 1-D with `width` elements per row, as a DTensor
        `[count, width]`, or unchanged if the layer is not sharded."""
        if self.mesh is None:
            return part
        return DTensor.from_local(
            part.detach().view(-1, width),
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([self.count, width]),
            stride=(width, 1),
        )

    def whole(self, part: Tensor, width: int) -> Tensor:
        """Return all rows, 1-D, gathered from the parts of all processes, which have to call this
        at the same time."""
        return whole(self.shard(part, width)).view(-1)


def own_weight(module: nn.Module) -> Tensor:
    """Return this process's rows of a layer's weight, `[rows, in]`, without a copy."""
    weight = weight_matrix(module)
    return weight.to_local() if isinstance(weight, DTensor) else weight


class MaskedRows(Tensor):
    """A process's rows of a weight, `[rows, in]`, for which FSDP gathers the output of `fill`.

    fill(out) writes the masked rows to a 1-D buffer of rows * in elements. It is called before each
    gathering.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def attach(cls, module: nn.Module, fill: Callable[[Tensor], None]) -> None:
        """Replace this process's rows of the layer by a MaskedRows on the same memory. Call this
        before the model's first pass."""
        weight = module.weight
        rows = Tensor._make_subclass(cls, weight.to_local())
        rows.fill = fill
        rows.most = most_rows(weight)
        # there is no public way: DTensor.from_local makes a view, which is a plain tensor
        weight._local_tensor = rows
        weight.requires_grad_()  # the first pass decides which gradients FSDP reduces

    def fsdp_pre_all_gather(
        self,
        mesh: object,
        outer_size: torch.Size,
        outer_stride: tuple,
        module: nn.Module,
        mp_policy: object,
    ) -> tuple:
        """Return what FSDP sends: the masked rows, padded to as many as the first process has."""
        out = torch.empty(self.most, self.shape[1], dtype=self.dtype, device=self.device)
        out[len(self) :] = 0
        if len(self):
            self.fill(out[: len(self)].view(-1))
        return (out,), None

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple | None:
        """Return the weight that the pass uses: the rows of all processes, one after another."""
        return None if out is not None else (outputs[0], ())
