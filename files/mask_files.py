"""Mask files: three formats, strictly verified whenever they are read.

    save          one .safetensors, packed; its metadata hold N:M, model, fingerprint, shapes and a checksum
    save_folder   the MaskPro authors': a folder of `<module>.pt`, one bool tensor each
    save_npz      MaskLLM's .npz: `<module>.weight.mask`, np.packbits of the flattened mask

Files are not trusted: no pickle runs, and every size a file claims is held against the bytes there before memory is
taken. A file that fails raises UserError with its name and what is wrong.
"""

import hashlib
import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from utils import UserError

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from files import npz
from files.atomic import atomic_write, refuse_existing
from files.packing import count_faults, pack, unpack
from pge import patterns

NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # a module's name may become a file's: no separators
MOST_PICKLE_BYTES = 4096  # a tensor's description takes a tenth
PICKLE_GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch BoolStorage", "collections OrderedDict"}
PICKLE_OPCODES = {"PROTO", "GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
                  "EMPTY_TUPLE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE",
                  "BINPERSID", "REDUCE", "STOP"}

Masks = Mapping[str, Tensor]  # layer name -> bool [out, in]
Shapes = dict[str, tuple[int, int]]  # layer name -> (out, in)


class PackedMasks(Masks):
    """Masks that take a bit a weight or less: each is unpacked, a byte a weight, when it is asked for."""

    def __init__(self, packed: dict[str, Tensor], shapes: Shapes, n: int, m: int):
        self._packed, self._shapes, self._n, self._m = packed, shapes, n, m

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self._packed[name], self._shapes[name], self._n, self._m)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass
class MaskFile:
    """What `load` found: masks (name -> bool [out, in]), N:M, and '' for a model or fingerprint the file lacks."""

    masks: Masks
    n: int = 0
    m: int = 0
    model: str = ""
    fingerprint: str = ""


def _new(path: str | Path, suffix: str):
    """`atomic_write` for a new file of this suffix."""
    if not Path(path).name.endswith(suffix):
        raise UserError(f"{path} must end in {suffix}")
    return atomic_write(refuse_existing(path, "choose another name or remove it first"))


def _writable(masks: Masks) -> Masks:
    for name, mask in masks.items():
        if not NAME.fullmatch(name) or mask.dtype != torch.bool or mask.dim() != 2 or not mask.numel():
            raise UserError(f"layer {name}: expected a module name and a bool mask [out, in], not {mask.dtype}")
    if not masks:
        raise UserError("there are no masks to save")
    return {name: mask.cpu() for name, mask in masks.items()}


def _digest(metadata: dict, packed: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(packed):
        sha.update(packed[name].numpy())
    return sha.hexdigest()


def save(path: str | Path, masks: Masks, n: int, m: int, model_name: str, fingerprint: str) -> None:
    """Write `masks` (name -> bool [out, in], strictly N:M) to `path`, one packed .safetensors.

    Written beside and renamed. UserError: `path` exists or cannot be written, or a layer (named) is not N:M.
    """
    masks = _writable(masks)
    if fault := _first_fault(masks, n, m)[1]:
        raise UserError(fault)
    packed = {name: pack(mask, n, m) for name, mask in masks.items()}
    metadata = {"format": "maskpro-mask", "version": "1", "sparsity": f"{n}:{m}", "model": model_name}
    metadata |= {"fingerprint": fingerprint, "shapes": json.dumps({k: [*v.shape] for k, v in masks.items()})}
    with _new(path, ".safetensors") as tmp:
        save_file(packed, tmp, metadata | {"checksum": _digest(metadata, packed)})


def save_folder(path: str | Path, masks: Masks) -> None:
    """Write `masks` (name -> bool [out, in]) as the MaskPro authors' folder of `<name>.pt`; errors as `save`."""
    masks = _writable(masks)
    with _new(path, "") as tmp:
        tmp.mkdir()
        for name, mask in masks.items():
            buffer = io.BytesIO()  # torch.save itself would report a full disk as RuntimeError
            torch.save(mask.clone(memory_format=torch.contiguous_format), buffer)  # not a view's storage
            (tmp / f"{name}.pt").write_bytes(buffer.getbuffer())


def save_npz(path: str | Path, masks: Masks) -> None:
    """Write `masks` (name -> bool [out, in]) as MaskLLM's .npz, `<name>.weight.mask`; errors as `save`."""
    masks = _writable(masks)
    with _new(path, ".npz") as tmp, open(tmp, "wb") as file:
        np.savez_compressed(file, **{f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})


def fingerprint(masks: Masks) -> str:
    """16 hex digits that change with any bit, name or shape of the masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{name} {tuple(mask.shape)}".encode())
        digest.update(np.packbits(mask.cpu().numpy().reshape(-1)).tobytes())
    return digest.hexdigest()[:16]


def most_bytes(masks: Masks, suffix: str) -> int:
    """Bytes that masks (name -> bool [out, in]) take in the format of this suffix, at most."""
    bits = sum(mask.numel() for mask in masks.values())
    return (bits if suffix == "" else bits // 8 + len(masks)) + 2048 * len(masks) + 4096


def save_as(path: str | Path, found: MaskFile) -> None:
    """Write a `MaskFile` in the format that the name asks for: .npz, no suffix for a folder, else `save`."""
    if Path(path).suffix == ".npz":
        save_npz(path, found.masks)
    elif not Path(path).suffix:
        save_folder(path, found.masks)
    else:
        save(path, found.masks, found.n, found.m, found.model, found.fingerprint)


def load(path: str | Path, n: int | None = None, m: int | None = None, shapes: Shapes | None = None) -> MaskFile:
    """Read a mask file of any of the three formats into a `MaskFile`, every block verified to keep exactly N of M.

    n, m: the wanted pattern; where None, the file's own (.safetensors) or the one its masks keep: M = 4 if it fits,
    else the smallest M in 2..16. shapes: name -> (out, in) of the model's layers; needed for .npz, which holds no
    shapes, and in every format a layer that is not among them is refused. That every layer of the model is there is
    for the caller to check. UserError: no such file, malformed, not strictly N:M (names the layer), another N:M.
    """
    if (n, m) != (None, None):
        patterns(n, m)
    path = Path(path)
    try:
        readers = {".safetensors": _read_safetensors, ".npz": _read_npz} if path.is_file() else {}
        read = _read_folder if path.is_dir() else readers.get(path.suffix)
        if not read:
            raise UserError("no such mask (.safetensors, .npz or a folder of .pt files); get_mask.py makes one")
        found = read(path, shapes)
        if not found.masks:
            raise UserError("holds no masks")
        found.n, found.m = _infer(found.masks, found.m or m)
        if m and (n, m) != (found.n, found.m):
            raise UserError(f"its masks are {found.n}:{found.m}, not {n}:{m} as asked: change one of them")
        return found
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a parser makes of a damaged file is the file's fault
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is damaged or no mask file ({reason}): restore it or make it anew") from error


def _first_fault(masks: Masks, n: int, m: int) -> tuple[int, str | None]:
    """(layers before the first that is not strictly N:M, what is wrong with it or None)."""
    for done, (name, mask) in enumerate(masks.items()):
        if mask.shape[1] % m:
            return done, f"layer {name}: {m} does not divide its {mask.shape[1]} inputs"
        if bad := count_faults(mask, n, m):
            return done, f"layer {name}: {bad} of {mask.numel() // m} blocks do not keep exactly {n} of {m}"
    return len(masks), None


def _infer(masks: Masks, m: int | None) -> tuple[int, int]:
    """(N, M) that every block of every layer keeps, M tried first; UserError names the layer that breaks the best."""
    first, faults = next(iter(masks.values())), []
    for trial in dict.fromkeys([m or 4, 4, *range(2, 17)]):
        kept = round(trial * int(first.sum()) / first.numel())
        if 0 < kept < trial:
            faults.append(_first_fault(masks, kept, trial))
            if faults[-1][1] is None:
                return kept, trial
    raise UserError(max(faults, key=lambda fault: fault[0])[1] if faults else "the first layer keeps all or nothing")


def _shape(name: str, shape: list | tuple, shapes: Shapes | None) -> tuple[int, int]:
    """(out, in) of a layer as the file claims it, once it is sane and agrees with the model's."""
    if not NAME.fullmatch(name) or (shapes is not None and name not in shapes):
        raise UserError(f"layer {name!r} is not one of the model's")
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise UserError(f"layer {name}: {shape} is not the shape of a mask")
    if shapes is not None and tuple(shape) != tuple(shapes[name]):
        raise UserError(f"layer {name}: its shape is {[*shape]}, the model's {[*shapes[name]]}")
    return tuple(shape)


def _read_safetensors(path: Path, shapes: Shapes | None) -> MaskFile:
    with safe_open(path, framework="pt") as file:  # it checks the header's offsets and shapes against the file's size
        metadata, names = file.metadata() or {}, file.keys()
        if (metadata.get("format"), metadata.get("version")) != ("maskpro-mask", "1"):
            raise UserError("is no maskpro-mask of version 1: give a mask file, or one this version can read")
        packed = {name: file.get_tensor(name) for name in names}
    checksum = metadata.pop("checksum")
    n, m = map(int, re.fullmatch(r"(\d\d?):(\d\d?)", metadata["sparsity"], re.ASCII).groups())
    claimed = {name: _shape(name, shape, shapes) for name, shape in json.loads(metadata["shapes"]).items()}
    if set(claimed) != set(packed) or checksum != _digest(metadata, packed):
        raise UserError("its contents do not match their checksum, the file is damaged: restore it or make it anew")
    return MaskFile(PackedMasks(packed, claimed, n, m), n, m, metadata["model"], metadata["fingerprint"])


def _read_folder(path: Path, shapes: Shapes | None) -> MaskFile:
    masks = {}
    for file in sorted(file for file in path.glob("*.pt") if file.is_file()):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            data = [member for member in members if "/data/" in member.filename]
            pickles = [member for member in members if member.filename.endswith(".pkl")]
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            size = sum(member.file_size for member in members)
            if (len(data), len(pickles)) != (1, 1) or not stored or size > file.stat().st_size:
                raise UserError(f"{file.name} is not one tensor as torch.save writes it")
            _check_pickle(file.name, archive.open(pickles[0]).read(MOST_PICKLE_BYTES + 1))
            # Only the description comes from torch.load: it would trust the pickle's size over that of the data.
            tensor = torch.load(file, map_location="meta", weights_only=True)
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() == data[0].file_size
            if tensor.dtype != torch.bool or not whole:
                raise UserError(f"{file.name} does not hold one contiguous bool tensor")
            shape = _shape(file.stem, [*tensor.shape], shapes)
            raw = np.frombuffer(bytearray(archive.read(data[0])), np.uint8)  # checks the CRC
        if raw.max() > 1:
            raise UserError(f"{file.name} has bytes that are no bool")
        masks[file.stem] = torch.from_numpy(raw).view(torch.bool).view(shape)
    return MaskFile(masks)


def _check_pickle(name: str, pickled: bytes) -> None:
    """UserError for more than describes a tensor: weights_only still lets a pickle take memory or time without end."""
    if len(pickled) > MOST_PICKLE_BYTES:
        raise UserError(f"{name} is not one tensor as torch.save writes it")
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name not in PICKLE_OPCODES or (opcode.name == "GLOBAL" and argument not in PICKLE_GLOBALS):
            raise UserError(f"{name} does not hold one contiguous bool tensor but asks for {argument or opcode.name}")


def _read_npz(path: Path, shapes: Shapes | None) -> MaskFile:
    if shapes is None:
        raise UserError("an .npz does not hold the shapes of its masks: give its --model (shapes=) as well")

    def layer(member: str) -> str:
        return member.removesuffix(".mask").removesuffix(".weight")

    def size(member: str) -> int:
        return -(-prod(_shape(layer(member), shapes.get(layer(member), ()), shapes)) // 8)

    masks = {}
    for member, bits in npz.read(path, size):
        name = layer(member)
        if name in masks or bits.shape != (size(member),) or bits.dtype != np.uint8:
            raise UserError(f"layer {name} appears twice or is not the bits of a mask {[*shapes[name]]}")
        mask = np.unpackbits(bits, count=prod(shapes[name]))
        masks[name] = torch.from_numpy(mask).view(torch.bool).view(tuple(shapes[name]))
    return MaskFile(masks)
