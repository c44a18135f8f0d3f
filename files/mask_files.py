"""Mask files: three formats, strictly verified on every read.

    NAME.safetensors   this project's: packed; the metadata hold N:M, model, fingerprint, shapes and
                       a checksum
    NAME               the MaskPro authors': a folder of `<module>.pt`, one bool tensor each
    NAME.npz           MaskLLM's: `<module>.weight.mask`, np.packbits of the flattened mask; or
                       PATCH's: the same as `<module>.weight`, with `<module>.weight.__shape__` and
                       `__meta__`, a JSON text of pattern and base model; only read

A file that is damaged or of another kind raises UserError with its name and the reason. No pickled
code is run.
"""

import hashlib
import io
import json
import math
import zipfile
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from files import checked_tensors
from files.atomic import atomic_write, refuse_existing
from files.packing import pack, unpack
from files.records import of_run
from utils import UserError, as_user_error, note

import numpy as np
import torch
from torch import Tensor

SHAPE = ".__shape__"  # ends the name of a shape in PATCH's files
ANEW = "restore it or make it anew"
Masks = Mapping[str, Tensor]  # layer name -> bool [out, in]
Shapes = dict[str, tuple[int, int]]  # layer name -> (out, in)


class PackedMasks(UserDict):
    """Masks stored in at most one bit per weight. Looking one up unpacks it, to one byte per
    weight."""

    def __init__(self, packed: dict[str, Tensor], shapes: Shapes, n: int, m: int):
        self.data = {name: (packed[name], shape, n, m) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        return unpack(*self.data[name])


def shapes_of(masks: Masks) -> Shapes:
    """Return the shape of each mask, without unpacking packed ones."""
    if isinstance(masks, PackedMasks):
        return {name: shape for name, (_, shape, _, _) in masks.data.items()}
    return {name: tuple(mask.shape) for name, mask in masks.items()}


@dataclass
class MaskFile:
    """Masks (name -> bool [out, in]) with their N:M and their model's name and fingerprint, each ''
    if unknown."""

    masks: Masks
    n: int
    m: int
    model: str = ""
    fingerprint: str = ""


def public_name(model: str) -> str:
    """Return a hub id unchanged and, for a local folder, only the folder's name."""
    path = Path(model).expanduser()
    return path.resolve().name if model and (path.exists() or path.is_absolute()) else model


def fingerprint(masks: Masks) -> str:
    """Return 16 hex digits that change with any bit, name or shape of the masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{name} {tuple(mask.shape)}".encode())
        digest.update(np.packbits(mask.cpu().numpy().reshape(-1)).tobytes())
    return digest.hexdigest()[:16]


def fill(mask: Tensor, n: int, m: int) -> tuple[Tensor, int]:
    """Return a mask, bool `[out, in]`, whose blocks keep at least N weights, and the number of
    blocks that kept fewer: these also keep their lowest free positions. `mask` may be
    overwritten."""
    blocks = mask.reshape(-1, m)
    counts = blocks.sum(1)
    short = counts < n
    missing = (n - counts[short])[:, None]
    free = ~blocks[short]
    blocks[short] |= free & (free.cumsum(1) <= missing)
    return blocks.view(mask.shape), int(short.sum())


def _fault(masks: Masks, n: int, m: int) -> str | None:
    """Return what is wrong with the first mask that is not strictly N:M, or None if all are."""
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
    """Write masks (name -> bool [out, in], strictly N:M) to `path`, in the format that its suffix
    stands for (see above).

    model, fingerprint: stored in a .safetensors only; if model is a local folder, only its name is
    stored. Raises UserError if `path` exists or cannot be written, or if a mask is not N:M (names
    the layer).
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
                buffer = io.BytesIO()  # torch.save to a file reports a full disk as RuntimeError
                # a clone, because the storage of a view may be larger
                torch.save(mask.clone(memory_format=torch.contiguous_format), buffer)
                (tmp / f"{name}.pt").write_bytes(buffer.getbuffer())


# --------------------------------------------------------------------------------------------------
# read


def load(
    path: str | Path, pattern: tuple[int, int] | None = None, shapes: Shapes | None = None
) -> MaskFile:
    """Read a mask file of any of the three formats, or the mask of a run's folder, and verify that
    every block keeps exactly N of M.

    pattern: the expected (N, M); None means the file's own for a .safetensors, and 2:4 for the
    other formats, which do not store theirs. shapes: name -> (out, in) of the model's layers,
    needed for .npz, which stores none. The caller has to check that the layers are those of a
    model. Raises UserError if the file is missing, damaged, not strictly N:M (names the layer) or
    of another N:M.
    """
    path = of_run(path, "mask.safetensors")
    n, m = pattern or (2, 4)
    with as_user_error(path, ANEW):
        if (path / "run.json").is_file():
            raise UserError("the run has no mask yet: let it finish, or continue it with --resume")
        if path.is_dir():
            mask_file = MaskFile(_read_folder(path), n, m)
        elif path.is_file() and path.suffix == ".npz":
            mask_file = _read_npz(path, shapes, n, m)
        elif path.is_file() and path.suffix == ".safetensors":
            mask_file = _read_safetensors(path)
        else:
            raise UserError(
                "no such mask (.safetensors, .npz or a folder of .pt files); get_mask.py makes one"
            )
        if not mask_file.masks:
            raise UserError("it holds no masks")
        if pattern and pattern != (mask_file.n, mask_file.m):
            raise UserError(
                f"its masks are {mask_file.n}:{mask_file.m}, not {pattern[0]}:{pattern[1]} as "
                "asked: change one of them"
            )
        if fault := _fault(mask_file.masks, mask_file.n, mask_file.m):
            raise UserError(
                f"{fault}; if the masks have another N:M, give --sparsity_type, or first convert "
                "them with get_mask.py --convert"
            )
        return mask_file


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
                damaged = archive.testzip()  # torch.load does not check the CRC-32
            mask = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(mask, Tensor):
                raise ValueError(f"{damaged} is damaged" if damaged else "it is not a tensor")
        masks[file.stem] = mask
    return masks


def _shape_in(archive: Mapping, key: str, name: str, shapes: Shapes | None) -> tuple[int, ...]:
    """Return the shape of the mask of this key and layer: the archive's, or else the model's."""
    if key + SHAPE in archive:
        return tuple(map(int, archive[key + SHAPE]))
    if shapes is None:
        raise UserError(
            "this .npz does not store the shapes of its masks: give its --model as well"
        )
    if name not in shapes:
        raise UserError(f"layer {name!r} is not one of the model's")
    return shapes[name]


def _read_npz(path: Path, shapes: Shapes | None, n: int, m: int) -> MaskFile:
    """Read MaskLLM's masks, which need the model's `shapes`, or PATCH's, which store shapes,
    pattern and base model. PATCH takes its masks from weights that are not zero, so blocks may keep
    fewer than N: these are filled up."""
    masks = {}
    filled = 0
    with np.load(path, allow_pickle=False) as archive:
        description = json.loads(str(archive["__meta__"])) if "__meta__" in archive else {}
        for key in archive:
            if key == "__meta__" or key.endswith(SHAPE):
                continue
            name = key.removesuffix(".mask").removesuffix(".weight")
            shape = _shape_in(archive, key, name, shapes)
            weights = math.prod(shape)
            bits = archive[key]
            if bits.dtype != np.uint8 or bits.shape != (math.ceil(weights / 8),):
                raise UserError(f"layer {name} does not hold the bits of a mask {[*shape]}")
            mask = torch.from_numpy(np.unpackbits(bits, count=weights).view(bool)).view(shape)
            if description and not weights % m:
                mask, short = fill(mask, n, m)
                filled += short
            masks[name] = mask
    pattern = description.get("pattern", f"{n}:{m}")
    if pattern != f"{n}:{m}" and (fault := _fault(masks, n, m)):
        raise UserError(f"its pattern is {pattern}, not {n}:{m}: {fault}")
    if filled:
        note(f"note: {filled} blocks of {path} kept fewer than {n} weights and were filled up")
    return MaskFile(masks, n, m, description.get("base_model", ""))
