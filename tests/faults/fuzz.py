"""Damaged and hostile files for every reader: each must give a clear error or a right read.

    python tests/faults/fuzz.py                          # 13,000 files and more
    python tests/faults/fuzz.py --readers npz --inputs 100000 --seed 7

For each reader (readers.py) a good file is written, then damaged (damage.py) and read, over and over. Per file, one of:

    refused     UserError, one line that names the file or its folder
    right       read, equal to what was written
    other       read, not equal, but sound: a strict N:M mask, numbers, text. What no checksum of the format could tell,
                such as a word of a text or two members of an .npz that changed places. None with our own masks.
    wrong       anything else: another exception, a read that is not sound, a crash, 10 s of processor time, or
                MOST_MIB more memory than before. The file is kept, and the exit code is 1.

Files are read in a process of their own for each hundred, so that a crash is counted and the rest goes on.
"""
import faulthandler
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as a command
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from utils import UserError, printable

from faults import damage, report
from faults.readers import READERS, Reader

BATCH, MOST_SECONDS, MOST_MIB = 100, 10, 96


def outcome(reader: Reader, original) -> str:
    """What reading comes to: refused, right, other, or 'wrong' and why."""
    try:
        found = reader.read()
    except UserError as error:
        try:
            line = printable(error)
        except BaseException as flaw:  # of a text that is none
            return f"wrong: its error cannot be printed, {type(flaw).__name__}: {flaw}"
        named = str(reader.files[0].parent) in line
        return "refused" if named else f"wrong: the error names no file: {line[:200]}"
    except BaseException as error:
        return f"wrong: {type(error).__name__}: {str(error)[:200]}"
    if _same(found, original):
        return "right"
    return "other" if reader.sound and reader.sound(found) else f"wrong: reads {str(found)[:200]}"


def _same(found, original) -> bool:
    return found == original or repr(found) == repr(original)  # nan is not equal to itself


def damaged(reader: Reader, index: int, seed: int, originals: dict[Path, bytes]) -> tuple[Path, bytes, str]:
    """The file to damage, its new content, and the damage's name: the same again for the same seed and index."""
    rng = random.Random(f"{reader.name} {seed} {index}")
    for _ in range(20):
        path, change = rng.choice(list(originals)), rng.choice(reader.damages)
        try:
            return path, change(originals[path], rng), change.__name__
        except (ValueError, KeyError, IndexError, struct.error):  # a damage to JSON drawn for a file that is none
            continue
    return path, damage.flipped(originals[path], rng), "flipped"


def _child(reader: Reader, indices: range, seed: int, originals, original, pipe: int) -> None:
    """Read the damaged files of these indices; report each twice, when it is begun and what it came to."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + 2**32,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    for index in indices:
        path, content, kind = damaged(reader, index, seed, originals)
        path.write_bytes(content)
        os.write(pipe, f"{json.dumps([index, kind, path.name, None])}\n".encode())
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # not caught: it ends the process, in C code too
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _peak_mib()
        result = outcome(reader, original)
        grown = _peak_mib() - before
        signal.setitimer(signal.ITIMER_PROF, 0)
        if grown > MOST_MIB:
            result = f"wrong: {grown:.0f} MiB more memory; {result}"
        os.write(pipe, f"{json.dumps([index, kind, path.name, result])}\n".encode())
        path.write_bytes(originals[path])


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def read_damaged(reader: Reader, inputs: int, seed: int, keep: Path | None = None) -> tuple[dict[str, int], list[str]]:
    """How often each outcome came, and of each wrong one what it was; with `keep`, the files that did it are there."""
    originals = {path: path.read_bytes() for path in reader.files}
    original = reader.read()
    counts, wrong, index = dict.fromkeys(("refused", "right", "other", "wrong"), 0), [], 0
    while index < inputs:
        out, pipe = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(out)
                _child(reader, range(index, min(index + BATCH, inputs)), seed, originals, original, pipe)
                os._exit(0)
            except BaseException:
                os._exit(1)
        os.close(pipe)
        with os.fdopen(out) as lines:
            reports = [json.loads(line) for line in lines]
        status = os.waitpid(child, 0)[1]
        if not reports:
            raise RuntimeError(f"{reader.name}: the child process ended before it read anything, status {status}")
        if reports[-1][3] is None:  # begun and not ended
            reports.append([*reports[-1][:3], f"wrong: the process ended, {_cause(status)}"])
        for index, kind, name, result in reports:
            if result is None:
                continue
            counts[result.partition(":")[0]] += 1
            if result.startswith("wrong"):
                wrong.append(f"{reader.name}, file {index} ({kind} {name}): {result}")
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    path, content, _ = damaged(reader, index, seed, originals)
                    (keep / f"{reader.name.replace(' ', '-')}-{index}-{path.name}").write_bytes(content)
        index += 1
        for path, content in originals.items():
            path.write_bytes(content)
    return counts, wrong


def _cause(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"exit code {os.WEXITSTATUS(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    return f"over {MOST_SECONDS} s of processor time" if name == "SIGPROF" else name


def campaign(inputs: int, seed: int, readers=READERS, keep: Path | None = None) -> tuple[list[dict], list[str]]:
    """A row of counts for each reader, and what went wrong."""
    rows, wrong = [], []
    for make in readers:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            (folder / "in").mkdir()
            reader = make(folder / "in")
            before = sorted(folder.rglob("*"))
            counts, found = read_damaged(reader, math.ceil(inputs * reader.share), seed, keep)
            if sorted(folder.rglob("*")) != before or Path("/tmp/escape").exists():
                counts["wrong"] += 1
                found.append(f"{reader.name}: reading left files behind")
        finally:
            shutil.rmtree(folder)
        rows.append({"reader": reader.name, "files": sum(counts.values()), **counts})
        wrong += found
    rows.append({"reader": "all", **{key: sum(row[key] for row in rows) for key in list(rows[0])[1:]}})
    return rows, wrong


# --------------------------------------------------------------------------------------------------------- the command

def add_arguments(parser) -> None:
    parser.add_argument("--inputs", type=int, default=None, help="damaged files a reader (default: 1000, --quick: 50)")
    parser.add_argument("--readers", default="", help="only those whose names contain this")


def run(args) -> tuple[list[dict], list[str]]:
    """Rows of counts, and what went wrong."""
    np.seterr(all="ignore")
    inputs = args.inputs or (50 if args.quick else 1000)
    chosen = [make for make in READERS if args.readers.replace(" ", "_") in make.__name__]
    return campaign(inputs, args.seed, chosen, Path("results/fuzz"))


def parse_args(argv=None):
    parser = report.make_parser(__doc__)
    add_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """The exit code: 1 where anything went wrong."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    rows, wrong = run(args)
    report.write(rows, args, "\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
