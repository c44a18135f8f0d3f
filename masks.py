"""N:M masks on disk: packed close to their entropy, strictly verified whenever they are read.

A mask is a bool tensor `[out, in]`. A block, M consecutive elements of a row, keeps exactly N: it is one of K = C(M, N)
patterns. `pack` writes the patterns' numbers as base-K digits, several to a little-endian word of 1..7 bytes: 2:4 puts
three blocks in a byte, 0.667 bit per weight where log2(6)/4 = 0.646 is the least possible. Three formats, by `load`:

    save          one .safetensors, packed; its metadata hold N:M, model, fingerprint, shapes and a checksum
    save_folder   the MaskPro authors': a folder of `<module>.pt`, one bool tensor each
    save_npz      MaskLLM's .npz: `<module>.weight.mask`, np.packbits of the flattened mask

Files are not trusted: no pickle runs, and every size a file claims is held against the bytes there before memory is
taken. A file that fails raises UserError with its name and what is wrong.
"""

import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import gcd, log2, prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils import UserError

CHUNK = 1 << 18  # blocks at a time: temporaries stay in the cache, and small beside the mask
INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # a module's name may become a file's: no separators


@dataclass
class MaskFile:
    """What `load` found: masks (name -> bool [out, in]), N:M, and '' for a model or fingerprint the file lacks."""

    masks: dict[str, torch.Tensor]
    n: int = 0
    m: int = 0
    model: str = ""
    fingerprint: str = ""


@lru_cache
def patterns(n, m):
    """The K = C(M, N) masks of a block, bool [K, M], in lexicographic order of kept indices (shared: do not modify).

    ValueError unless 1 <= N < M <= 16.
    """
    if not 1 <= n < m <= 16:
        raise ValueError(f"N:M must satisfy 1 <= N < M <= 16, not {n}:{m}")
    kept = torch.tensor(list(combinations(range(m), n)))  # [K, N]
    return torch.zeros(len(kept), m, dtype=torch.bool).scatter_(1, kept, True)


@lru_cache
def word_size(n, m):
    """(W, b): bytes in a word and blocks in it, K**b <= 256**W. The shortest word within 3 % of the fewest bits."""
    bits = log2(len(patterns(n, m)))  # exact where K**b == 256**W is possible: powers of two
    sizes = [(width, int(8 * width / bits)) for width in range(1, 8) if 8 * width >= bits]  # 7 bytes fit an int64
    fewest = min(width / digits for width, digits in sizes)
    return next((width, digits) for width, digits in sizes if width / digits <= 1.03 * fewest)


def _block_bits(blocks):
    """bool [B, M] -> int [B] whose bit i is the block's element i."""
    m, width = blocks.shape[1], gcd(blocks.shape[1], 8)
    # Read `width` bools as one integer; the product moves byte i's bit to bit i of the top byte, without carries.
    magic = sum(1 << (8 * (width - 1) - 7 * i) for i in range(width))
    parts = ((blocks.view(INT[width]) * magic) >> (8 * (width - 1))) & ((1 << width) - 1)  # [B, M / width]
    bits = parts[:, 0].int()
    for j in range(1, m // width):
        bits |= parts[:, j].int() << (width * j)
    return bits


@lru_cache
def _code_table(n, m):
    """[2**M]: the pattern's number by a block's bits; the dtype's maximum (never a number) for blocks that are none."""
    dtype = torch.uint8 if len(patterns(n, m)) <= 256 else torch.int16
    table = torch.full((2**m,), torch.iinfo(dtype).max, dtype=dtype)
    table[_block_bits(patterns(n, m))] = torch.arange(len(patterns(n, m))).to(dtype)
    return table


def _codes(mask, n, m):
    """(codes [blocks], how many of them are no pattern); errors of shape as `pattern_codes`."""
    table = _code_table(n, m).to(mask.device)
    if mask.dtype != torch.bool or mask.dim() == 0 or mask.shape[-1] % m:
        raise ValueError(f"a mask is a bool tensor whose last dimension {m} divides, not {mask.dtype} {[*mask.shape]}")
    flat = mask.contiguous().view(-1)
    if flat.storage_offset() % gcd(m, 8):  # a view into another tensor, misaligned for wider integers
        flat = flat.clone()
    codes = torch.cat([table[_block_bits(blocks)] for blocks in flat.view(-1, m).split(CHUNK)])
    return codes, int((codes == torch.iinfo(table.dtype).max).sum())


def check(mask, n, m):
    """How many blocks of `mask` (bool [..., in]) do not keep exactly N. ValueError when M does not divide `in`."""
    return _codes(mask, n, m)[1]


def pattern_codes(mask, n, m):
    """mask bool [..., in] -> [blocks], each block's row in `patterns(n, m)`: uint8 when K <= 256, else int16.

    ValueError when M does not divide `in` or a block does not keep exactly N.
    """
    codes, bad = _codes(mask, n, m)
    if bad:
        raise ValueError(f"{bad} of {len(codes)} blocks do not keep exactly {n} of {m}")
    return codes


def codes_to_mask(codes, shape, n, m):
    """The inverse of `pattern_codes`: codes [blocks] -> bool of `shape`. UserError for codes or shapes that misfit."""
    table = patterns(n, m).view(INT[gcd(m, 8)]).to(codes.device)  # [K, M / width], rows copied as wide integers
    if shape[-1] % m or prod(shape) != len(codes) * m:
        raise UserError(f"{len(codes)} blocks of {m} do not make a mask of shape {[*shape]}")
    if len(codes) and not 0 <= codes.min() <= codes.max() < len(table):
        raise UserError(f"a block's code is none of the {len(table)} patterns of {n}:{m}: the data are damaged")
    mask = torch.empty(len(codes), table.shape[1], dtype=table.dtype, device=codes.device)
    for i in range(0, len(codes), CHUNK):
        torch.index_select(table, 0, codes[i : i + CHUNK].int(), out=mask[i : i + CHUNK])
    return mask.view(torch.bool).view(*shape)


def pack(mask, n, m):
    """mask bool [..., in] -> uint8 [bytes], exactly: base-K digits in words of `word_size`, the last filled with 0.

    ValueError when M does not divide `in` or a block does not keep exactly N.
    """
    base, (width, digits) = len(patterns(n, m)), word_size(n, m)
    codes = pattern_codes(mask, n, m)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % digits)).view(-1, digits)  # [words, b]
    packed = torch.empty(len(codes), width, dtype=torch.uint8, device=mask.device)
    for some, out in zip(codes.split(CHUNK // digits), packed.split(CHUNK // digits), strict=True):
        words = torch.zeros(len(some), dtype=INT[4 if width < 4 else 8], device=mask.device)
        for j in reversed(range(digits)):
            words.mul_(base).add_(some[:, j])
        out.copy_(words.view(-1, 1).view(torch.uint8)[:, :width])
    return packed.view(-1)


def unpack(packed, shape, n, m):
    """The inverse of `pack`: uint8 [bytes] -> bool of `shape`. UserError for bytes which `pack` does not write."""
    base, (width, digits) = len(patterns(n, m)), word_size(n, m)
    blocks = prod(shape) // m
    size = -(-blocks // digits)  # words
    if packed.dtype != torch.uint8 or shape[-1] % m or packed.numel() != size * width:
        found = f"{packed.numel()} of {packed.dtype}"
        raise UserError(f"a {n}:{m} mask of shape {[*shape]} takes {size * width} bytes, not {found}")
    codes = torch.empty(size, digits, dtype=_code_table(n, m).dtype, device=packed.device)
    packed = packed.view(size, width)
    for some, out in zip(packed.split(CHUNK // digits), codes.split(CHUNK // digits), strict=True):
        words = torch.zeros(len(some), 1, dtype=INT[4 if width < 4 else 8], device=packed.device)
        words.view(torch.uint8)[:, :width] = some
        words = words.view(-1)
        for j in range(digits):
            rest = torch.div(words, base, rounding_mode="trunc")
            out[:, j] = words.sub_(rest, alpha=base)
            words = rest
        if words.any():
            raise UserError(f"the packed bytes hold a number that is no {n}:{m} pattern: the data are damaged")
    if codes.view(-1)[blocks:].any():
        raise UserError("the packed bytes go on after the last block: the data are damaged")
    return codes_to_mask(codes.view(-1)[:blocks], shape, n, m)


@contextmanager
def _beside(path, suffix):
    """Yield a hidden name beside `path`; on success sync what was written there and rename it to `path`."""
    path = Path(path)
    if not path.name.endswith(suffix):
        raise UserError(f"{path} must end in {suffix}")
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: choose another name or remove it first")
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        for written in [*tmp.glob("*"), tmp]:
            os.fsync(handle := os.open(written, os.O_RDONLY))
            os.close(handle)
        os.replace(tmp, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def _writable(masks):
    for name, mask in masks.items():
        if not NAME.fullmatch(name) or mask.dtype != torch.bool or mask.dim() != 2 or not mask.numel():
            raise UserError(f"layer {name}: expected a module name and a bool mask [out, in], not {mask.dtype}")
    if not masks:
        raise UserError("there are no masks to save")
    return {name: mask.cpu() for name, mask in masks.items()}


def _digest(metadata, packed):
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(packed):
        sha.update(packed[name].numpy())
    return sha.hexdigest()


def save(path, masks, n, m, model_name, fingerprint):
    """Write `masks` (name -> bool [out, in], strictly N:M) to `path`, one packed .safetensors.

    Written beside and renamed. UserError: `path` exists or cannot be written, or a layer (named) is not N:M.
    """
    masks = _writable(masks)
    if fault := _first_fault(masks, n, m)[1]:
        raise UserError(fault)
    packed = {name: pack(mask, n, m) for name, mask in masks.items()}
    metadata = {"format": "maskpro-mask", "version": "1", "sparsity": f"{n}:{m}", "model": model_name}
    metadata |= {"fingerprint": fingerprint, "shapes": json.dumps({k: [*v.shape] for k, v in masks.items()})}
    with _beside(path, ".safetensors") as tmp:
        save_file(packed, tmp, metadata | {"checksum": _digest(metadata, packed)})


def save_folder(path, masks):
    """Write `masks` (name -> bool [out, in]) as the MaskPro authors' folder of `<name>.pt`; errors as `save`."""
    masks = _writable(masks)
    with _beside(path, "") as tmp:
        tmp.mkdir()
        for name, mask in masks.items():
            torch.save(mask.clone(memory_format=torch.contiguous_format), tmp / f"{name}.pt")  # not a view's storage


def save_npz(path, masks):
    """Write `masks` (name -> bool [out, in]) as MaskLLM's .npz, `<name>.weight.mask`; errors as `save`."""
    masks = _writable(masks)
    with _beside(path, ".npz") as tmp, open(tmp, "wb") as file:
        np.savez_compressed(file, **{f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})


def load(path, n=None, m=None, shapes=None):
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
            raise UserError("no such mask: expected a .safetensors, an .npz or a folder of .pt files")
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


def _first_fault(masks, n, m):
    """(layers before the first that is not strictly N:M, what is wrong with it or None)."""
    for done, (name, mask) in enumerate(masks.items()):
        if mask.shape[1] % m:
            return done, f"layer {name}: {m} does not divide its {mask.shape[1]} inputs"
        if bad := check(mask, n, m):
            return done, f"layer {name}: {bad} of {mask.numel() // m} blocks do not keep exactly {n} of {m}"
    return len(masks), None


def _infer(masks, m):
    """(N, M) that every block of every layer keeps, M tried first; UserError names the layer that breaks the best."""
    first, faults = next(iter(masks.values())), []
    for trial in dict.fromkeys([m or 4, 4, *range(2, 17)]):
        kept = round(trial * int(first.sum()) / first.numel())
        if 0 < kept < trial:
            faults.append(_first_fault(masks, kept, trial))
            if faults[-1][1] is None:
                return kept, trial
    raise UserError(max(faults, key=lambda fault: fault[0])[1] if faults else "the first layer keeps all or nothing")


def _shape(name, shape, shapes):
    """(out, in) of a layer as the file claims it, once it is sane and agrees with the model's."""
    if not NAME.fullmatch(name) or shapes is not None and name not in shapes:
        raise UserError(f"layer {name!r} is not one of the model's")
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise UserError(f"layer {name}: {shape} is not the shape of a mask")
    if shapes is not None and tuple(shape) != tuple(shapes[name]):
        raise UserError(f"layer {name}: its shape is {[*shape]}, the model's {[*shapes[name]]}")
    return tuple(shape)


def _read_safetensors(path, shapes):
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
    masks = {name: unpack(packed.pop(name), shape, n, m) for name, shape in claimed.items()}
    return MaskFile(masks, n, m, metadata["model"], metadata["fingerprint"])


def _read_folder(path, shapes):
    masks = {}
    for file in sorted(file for file in path.glob("*.pt") if file.is_file()):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            data = [member for member in members if "/data/" in member.filename]
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if len(data) != 1 or not stored or sum(member.file_size for member in members) > file.stat().st_size:
                raise UserError(f"{file.name} is not one tensor as torch.save writes it")
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


def _read_npz(path, shapes):
    if shapes is None:
        raise UserError("an .npz does not hold the shapes of its masks: give the model (or shapes=) as well")
    masks = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        file.seek(-12, os.SEEK_END)  # the count in the end record: zipfile overlooks entries lost to a wrong length
        if int.from_bytes(file.read(2), "little") != len(archive.infolist()):
            raise UserError("its directory has lost layers, the file is damaged: restore it or make it anew")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy").removesuffix(".mask").removesuffix(".weight")
            shape = _shape(name, shapes.get(name, ()), shapes)
            size, known = -(-prod(shape) // 8), member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if name in masks or not known or not size < member.file_size < size + 1024:  # the bits and an .npy header
                raise UserError(f"layer {name} appears twice or is not the bits of a mask {[*shape]}")
            with archive.open(member) as content:
                raw = content.read(member.file_size)  # a bare read() inflates a bomb past the size it claims
            header = io.BytesIO(raw)
            np.lib.format.read_magic(header)
            found, _, dtype = np.lib.format.read_array_header_1_0(header)
            bits = raw[header.tell() :]
            if found != (size,) or dtype != np.uint8 or len(bits) != size:
                raise UserError(f"layer {name}: {found} of {dtype} are not the bits of a mask {[*shape]}")
            mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=prod(shape))
            masks[name] = torch.from_numpy(mask).view(torch.bool).view(shape)
    return MaskFile(masks)
