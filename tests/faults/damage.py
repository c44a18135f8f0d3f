"""Damage to files: what a bad disk, a torn copy or an attacker makes of them. Each is a (bytes, random) -> bytes.

BYTES fit any file; ZIP, NPY, PICKLE, SAFETENSORS, JSON and GZIP know a format, and leave its checksums whole.
"""
import gzip
import io
import json
import struct
import warnings
import zipfile
from functools import lru_cache

HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
DEEP = "a hundred thousand brackets"  # stands for them until the JSON is written
VALUES = (None, True, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, 2**62, "", "a", [], {}, DEEP,
          [1, 2], ["../x", "y"], {"a": 1}, {"__class__": "os.system"}, "../../../etc/passwd", "/etc/passwd",
          "x" * 100_000, "\x1b[2J\x07\u202e", "\ud800", "a\nb | c", [2**40, 2**40], [[0, 2**60]])
NAMES = ("../../escape", "/tmp/escape", "..", "", "a/../../b", "C:\\escape", "\ud800", "x" * 5000, "a\x00b")


# ----------------------------------------------------------------------------------------------------------- any bytes

def truncated(raw, rng):
    return raw[:rng.randrange(len(raw))] if raw else raw


def flipped(raw, rng):
    bad = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def zeroed(raw, rng):
    start = rng.randrange(len(raw))
    size = min(len(raw) - start, rng.choice((1, 8, 64, 512)))
    return raw[:start] + bytes(size) + raw[start + size:]


def huge_number(raw, rng):
    """A count, size or offset that claims far more than is there."""
    value = struct.pack("<Q", rng.choice(HUGE))[:rng.choice((1, 2, 4, 8))]
    start = rng.randrange(max(1, len(raw) - len(value)))
    return raw[:start] + value + raw[start + len(value):]


def moved(raw, rng):
    """Two pieces change places, as blocks of a file system do."""
    a, b, c, d = sorted(rng.randrange(len(raw) + 1) for _ in range(4))
    return raw[:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:]


def doubled(raw, rng):
    start, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    return raw[:end] + raw[start:end] + raw[end:]


def extended(raw, rng):
    return raw + rng.randbytes(rng.choice((1, 22, 1000)))


BYTES = (truncated, flipped, flipped, zeroed, huge_number, moved, doubled, extended)


# ---------------------------------------------------------------------------------------------------------------- JSON

def hostile(value, rng):
    """The value with something inside it replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.randrange(10)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            return {(rng.choice(NAMES) if k == key else k): v for k, v in value.items()}
        if action == 2:  # two entries change places
            other = rng.choice(list(value))
            return value | {key: value[other], other: value[key]}
        return value | {key: hostile(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], hostile(value[at], rng), *value[at + 1:]] if rng.random() < 0.8 else value * 2
    return rng.choice(VALUES)


def _written(value) -> bytes:
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def edited_json(raw, rng):
    """One value of a JSON file, or of one of its lines, made hostile."""
    try:
        return _written(hostile(json.loads(raw), rng))
    except ValueError:
        lines = raw.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _written(hostile(json.loads(lines[at]), rng))
    return b"\n".join(lines) + b"\n"


JSON = (edited_json,)


def edited_header(raw, rng):
    """A .safetensors whose header, well formed, claims something else of the same data."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    if "__metadata__" in header and rng.random() < 0.3:
        held = header["__metadata__"]
        if rng.random() < 0.5 and "shapes" in held:
            held["shapes"] = _written(hostile(json.loads(held["shapes"]), rng)).decode()
        else:
            held[rng.choice(list(held))] = rng.choice(("", "1:2", "8:16", "99:99", "../x", "{}", "1" * 5000))
    else:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
            ("BOOL", "I8", "F64", "F8_E4M3", [2**40], [2**62, 2**62], [0], [], [-1], [0, 2**60], [10, 5], [0, 1]))
    text = _written(header)
    return struct.pack("<Q", len(text)) + text + raw[8 + size:]


SAFETENSORS = (edited_header,)


# ----------------------------------------------------------------------------------------------------------------- zip

def _members(raw) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return [(member.filename, archive.read(member)) for member in archive.infolist()]


def _zipped(members, method=zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in members:
            member = zipfile.ZipInfo(name.encode("utf-8", "replace").decode() or "x")  # dated 1980, always
            archive.writestr(member, content, method)
    return target.getvalue()


def swapped_members(raw, rng):
    members = _members(raw)
    a, b = rng.randrange(len(members)), rng.randrange(len(members))
    names = [name for name, _ in members]
    names[a], names[b] = names[b], names[a]
    return _zipped(zip(names, (content for _, content in members)))


def member_named(raw, rng):
    """A member, or one more, under the name of another or of a file elsewhere."""
    members = _members(raw)
    at, name = rng.randrange(len(members)), rng.choice((*NAMES, rng.choice(members)[0]))
    added = [(name, members[at][1])]
    return _zipped(members + added if rng.random() < 0.5 else members[:at] + added + members[at + 1:])


def member_lost(raw, rng):
    members = _members(raw)
    del members[rng.randrange(len(members))]
    return _zipped(members)


@lru_cache
def _zeros(name: str, mebibytes: int) -> bytes:
    return _zipped([(name, bytes(mebibytes << 20))], zipfile.ZIP_DEFLATED)


def zip_bomb(raw, rng):
    """A member of 128 MiB, which deflate makes 128 KiB; every other one understates its size."""
    name = rng.choice(_members(raw))[0]
    bomb = _zeros(name, 128)
    return bomb if rng.random() < 0.5 else bomb.replace(struct.pack("<I", 128 << 20), struct.pack("<I", 600))


def other_content(raw, rng):
    """A member damaged before its checksum was taken."""
    members = _members(raw)
    at = rng.randrange(len(members))
    members[at] = members[at][0], rng.choice(BYTES)(members[at][1] or b"x", rng)
    return _zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


ZIP = (swapped_members, member_named, member_lost, zip_bomb, other_content)


def edited_npy(raw, rng):
    """An array of an .npz that claims another type or shape."""
    members = _members(raw)
    at = rng.randrange(len(members))
    name, content = members[at]
    size = struct.unpack("<H", content[8:10])[0]
    dtype = rng.choice(("|O", "|i1", "<f8", "|b1", "<U1000000", "|S8", "[('a', '<f8')]", "|V0", "<M8[s]"))
    shape = rng.choice(("()", "(0,)", f"({2**40},)", f"({2**62}, 16)", "(-1,)", "(1, 1)",
                        f"({len(content) - size - 10},)", "(" * 90, "('a',)", "(1.5,)", "(True,)", f"({10**500},)"))
    dtype = dtype if dtype.startswith("[") else repr(dtype)
    header = f"{{'descr': {dtype}, 'fortran_order': {rng.choice((True, False))}, 'shape': {shape}, }}".encode()
    members[at] = name, content[:8] + struct.pack("<H", len(header)) + header + content[10 + size:]
    return _zipped(members)


NPY = (edited_npy, edited_npy)

PICKLES = (
    b"cos\nsystem\n(S'touch /tmp/escape'\ntR.",  # runs a command
    b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",  # 2 GiB of zeros: torch's weights_only allows the call
    b"\x80\x02" + b"}" + b"K\x01" + b"\x85" * 3 + b"K\x01s.",  # a dict, with tuples for keys
    b"\x80\x02}(" + b"".join([b"K\x01\x85q\x00", *(b"0h%c" % i + b"h%c\x86q%c" % (i, i + 1) for i in range(100))]) +
    b"K\x01u.",  # a key of 2^100 parts, whose hash never ends
    b"(" * 3000, b"\x80\x02" + b"\x85" * 3000 + b".", b"\x80\x05.", b"", b".", b"N.")


def other_pickle(raw, rng):
    """A .pt whose description is hostile, or claims more than the data hold."""
    members = _members(raw)
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    content = members[at][1]
    if rng.random() < 0.5:
        content = rng.choice(PICKLES)
    else:  # a number, as BININT1, becomes a huge one
        places = [i for i in range(len(content) - 1) if content[i:i + 1] == b"K"]
        place = rng.choice(places) if places else 0
        content = content[:place] + b"J" + struct.pack("<i", rng.choice((2**31 - 1, -1, 2**30))) + content[place + 2:]
    members[at] = members[at][0], content
    return _zipped(members)


PICKLE = (other_pickle, other_pickle)


# ---------------------------------------------------------------------------------------------------------------- gzip

@lru_cache
def _packed_zeros(sign: bytes) -> bytes:
    return gzip.compress(sign * (64 << 20 if sign == b" " else 8 << 20))


def gzip_bomb(raw, rng):
    """64 MiB without an end of line, or 8 MiB of ends of lines."""
    return _packed_zeros(rng.choice((b" ", b"\n")))


def other_text(raw, rng):
    """Damaged before it was packed."""
    return gzip.compress(rng.choice((*BYTES, edited_json))(gzip.decompress(raw), rng), 1, mtime=0)


GZIP = (other_text, other_text, gzip_bomb)
