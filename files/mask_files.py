"""Mask files: three formats, strictly verified whenever they are read.

    NAME.safetensors   ours, packed; its metadata hold N:M, model, fingerprint, shapes and a
                       checksum
    NAME               the MaskPro authors': a folder of `<module>.pt`, one bool tensor each
    NAME.npz           MaskLLM's: `<module>.weight.mask`, np.packbits of the flattened mask

A file that is damaged or of another kind raises UserError with its name and what is wrong. No
pickle runs.
"""

import hashlib
import io
import json
import zipfile
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from files import checked_tensors
from files.atomic import atomic_write, refuse_existing
from files.packing import pack, unpack
from files.records import of_run
from utils import UserError, as_user_error

import numpy as np
import torch
from torch import Tensor

ANEW = "restore it or make it anew"
Masks = Mapping[str, Tensor]  # layer name -> bool [out, in]
Shapes = dict[str, tuple[int, int]]  # layer name -> (out, in)


class PackedMasks(UserDict):
    """Masks that take a bit a weight or less: each is unpacked, a byte a weight, when it is asked
    for."""

    def __init__(self, packed: dict[str, Tensor], shapes: Shapes, n: int, m: int):
        self.data = {name: (packed[name], shape, n, m) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        return unpack(*self.data[name])


def shapes_of(masks: Masks) -> Shapes:
    """The shape of each mask; a packed one is not unpacked for it."""
    if isinstance(masks, PackedMasks):
        return {name: shape for name, (_, shape, _, _) in masks.data.items()}
    return {name: tuple(mask.shape) for name, mask in masks.items()}


@dataclass
class MaskFile:
    """Masks (name -> bool [out, in]) with their N:M and the model that they are of, '' where that
    is not known."""

    masks: Masks
    n: int
    m: int
    model: str = ""
    fingerprint: str = ""


def public_name(model: str) -> str:
    """A hub id as it is; of a local folder its name."""
    path = Path(model).expanduser()
    return path.resolve().name if model and (path.exists() or path.is_absolute()) else model


def fingerprint(masks: Masks) -> str:
    """16 hex digits that change with any bit, name or shape of the masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{name} {tuple(mask.shape)}".encode())
        digest.update(np.packbits(mask.cpu().numpy().reshape(-1)).tobytes())
    return digest.hexdigest()[:16]


def _fault(masks: Masks, n: int, m: int) -> str | None:
    """What is wrong with the first layer that is no strict N:M mask; None where all are."""
    for name, mask in masks.items():
        if "/" in name or mask.dtype != torch.bool or mask.dim() != 2:
            return (
                f"layer {name}: expected a module's name and a bool mask [out, in], not "
                f"{mask.dtype} {[*mask.shape]}"
            )
        if mask.shape[1] % m:
            return f"layer {name}: {m} does not divide its {mask.shape[1]} inputs"
        kept = mask.reshape(-1, m).sum(1, dtype=torch.uint8)
        if bad := int((kept != n).sum()):
            return f"layer {name}: {bad} of {len(kept)} blocks do not keep exactly {n} of {m}"


# --------------------------------------------------------------------------------------------------
# write


def save(
    path: str | Path, masks: Masks, n: int, m: int, model: str = "", fingerprint: str = ""
) -> None:
    """Write masks (name -> bool [out, in], strictly N:M) to `path`, in the format that its name
    asks for (see above).

    model, fingerprint: kept in a .safetensors only; of a model's folder its name alone. UserError:
    `path` exists or cannot be written, or a layer (named) is not N:M.
    """
    path = refuse_existing(path, "choose another name or remove it")
    masks = {name: mask.cpu() for name, mask in masks.items()}
    if fault := _fault(masks, n, m):
        raise UserError(fault)
    with atomic_write(path) as tmp:
        if path.suffix == ".npz":
            with open(tmp, "wb") as file:
                np.savez_compressed(
                    file,
                    **{
                        f"{name}.weight.mask": np.packbits(mask.numpy())
                        for name, mask in masks.items()
                    },
                )
        elif path.suffix == ".safetensors":
            packed = {name: pack(mask, n, m) for name, mask in masks.items()}
            metadata = {
                "format": "maskpro-mask",
                "version": "1" if (n, m) == (2, 4) else "2",
                "sparsity": f"{n}:{m}",
                "model": public_name(model),
                "fingerprint": fingerprint,
                "shapes": json.dumps({name: [*mask.shape] for name, mask in masks.items()}),
            }
            checked_tensors.save(tmp, packed, metadata)
        else:
            tmp.mkdir()
            for name, mask in masks.items():
                buffer = io.BytesIO()  # torch.save itself would report a full disk as RuntimeError
                # not a view's storage
                torch.save(mask.clone(memory_format=torch.contiguous_format), buffer)
                (tmp / f"{name}.pt").write_bytes(buffer.getbuffer())


# --------------------------------------------------------------------------------------------------
# read


def load(
    path: str | Path, pattern: tuple[int, int] | None = None, shapes: Shapes | None = None
) -> MaskFile:
    """Read a mask file of any of the three formats, or a run's, into a `MaskFile`, every block
    verified to keep exactly N of M.

    pattern: the wanted (N, M); None: the file's own (.safetensors) or 2:4, for the other formats do
    not say theirs. shapes: name -> (out, in) of the model's layers, for .npz, which holds none.
    That the layers are those of a model is for the caller to check. UserError: no such file,
    damaged, not strictly N:M (names the layer), another N:M.
    """
    path = of_run(path, "mask.safetensors")
    n, m = pattern or (2, 4)
    with as_user_error(path, ANEW):
        if (path / "run.json").is_file():
            raise UserError("the run has no mask yet: let it finish, or go on with it by --resume")
        if path.is_dir():
            found = MaskFile(_read_folder(path), n, m)
        elif path.is_file() and path.suffix == ".npz":
            found = MaskFile(_read_npz(path, shapes), n, m)
        elif path.is_file() and path.suffix == ".safetensors":
            found = _read_safetensors(path)
        else:
            raise UserError(
                "no such mask (.safetensors, .npz or a folder of .pt files); get_mask.py makes one"
            )
        if not found.masks:
            raise UserError("holds no masks")
        if pattern and pattern != (found.n, found.m):
            raise UserError(
                f"its masks are {found.n}:{found.m}, not {pattern[0]}:{pattern[1]} as asked: "
                "change one of them"
            )
        if fault := _fault(found.masks, found.n, found.m):
            raise UserError(
                f"{fault}; if the masks are of another N:M, give --sparsity_type, or convert them "
                "first, with get_mask.py --convert"
            )
        return found


def _read_safetensors(path: Path) -> MaskFile:
    packed, metadata = checked_tensors.load(path, "maskpro-mask", ("1", "2"))
    n, m = map(int, metadata["sparsity"].split(":"))
    shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
    return MaskFile(
        PackedMasks(packed, shapes, n, m), n, m, metadata["model"], metadata["fingerprint"]
    )


def _read_folder(path: Path) -> Masks:
    masks = {}
    for file in sorted(path.glob("*.pt")):
        with as_user_error(file.name, ANEW):
            with zipfile.ZipFile(file) as archive:
                flaw = archive.testzip()  # torch.load does not check the CRC-32
            mask = None if flaw else torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(mask, Tensor):
                raise ValueError(f"{flaw} is damaged" if flaw else "it is no tensor")
        masks[file.stem] = mask
    return masks


def _read_npz(path: Path, shapes: Shapes | None) -> Masks:
    if shapes is None:
        raise UserError("an .npz does not hold the shapes of its masks: give its --model as well")
    masks = {}
    with np.load(path, allow_pickle=False) as archive:
        for key, bits in archive.items():
            name = key.removesuffix(".mask").removesuffix(".weight")
            if name not in shapes:
                raise UserError(f"layer {name!r} is not one of the model's")
            weights = prod(shapes[name])
            if bits.dtype != np.uint8 or bits.shape != (-(-weights // 8),):
                raise UserError(f"layer {name} is not the bits of a mask {[*shapes[name]]}")
            masks[name] = torch.from_numpy(np.unpackbits(bits, count=weights).view(bool)).view(
                *shapes[name]
            )
    return masks
