"""Damaged and hostile files for every reader: each must give a clear error or a right read.

    python bench/fuzz.py                          # 13,000 files and more
    python bench/fuzz.py --readers npz --inputs 100000 --seed 7

For each reader a good file is written, then damaged (bench/damage.py) and read, over and over. Per file, one of:

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import damage
import numpy as np
import pyarrow
import torch
from pyarrow import parquet

import baseline
import data
import evaluate
import figures
import get_mask
import mask_files
import plot
import tasks
from masks import check
from utils import UserError, load_model, model_fingerprint, printable

BATCH, MOST_SECONDS, MOST_MIB = 100, 10, 96
SHAPES = {"model.layers.0.q_proj": (8, 32), "model.layers.0.o_proj": (8, 32), "model.layers.1.up_proj": (24, 16)}


@dataclass
class Reader:
    """One kind of file: `files` are damaged in turn, `read()` reads what they are part of and says what it found.

    sound: is a read that differs from the first still sound? None: the format has a checksum, no other read is right.
    share: of the --inputs, where a read takes long.
    """
    name: str
    files: list[Path]
    read: Callable[[], object]
    damages: tuple
    sound: Callable[[object], bool] | None
    share: float = 1.0


# ---------------------------------------------------------------------------------------------------------- the readers

def _masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(out * width // 4, 4, generator=generator).argsort(1).lt(2).view(out, width)
            for name, (out, width) in SHAPES.items()}


def _found(found: mask_files.MaskFile):
    return {name: mask.numpy().tobytes() for name, mask in found.masks.items()}, found.n, found.m, found.fingerprint


def _strict(found) -> bool:
    masks, n, m, _ = found
    return all(not check(torch.frombuffer(bytearray(raw), dtype=torch.bool).view(SHAPES[name]), n, m)
               for name, raw in masks.items())


def mask_safetensors(folder: Path) -> Reader:
    path = folder / "mask.safetensors"
    mask_files.save(path, _masks(), 2, 4, "some/model", "0" * 16)
    return Reader("mask .safetensors", [path], lambda: _found(mask_files.load(path, shapes=SHAPES)),
                  damage.BYTES + damage.SAFETENSORS * 3, None)


def mask_npz(folder: Path) -> Reader:
    path = folder / "mask.npz"
    mask_files.save_npz(path, _masks())
    return Reader("mask .npz", [path], lambda: _found(mask_files.load(path, shapes=SHAPES)),
                  damage.BYTES + damage.ZIP + damage.NPY, _strict)


def mask_folder(folder: Path) -> Reader:
    path = folder / "mask"
    mask_files.save_folder(path, _masks())
    return Reader("mask folder of .pt", sorted(path.iterdir()), lambda: _found(mask_files.load(path, shapes=SHAPES)),
                  damage.BYTES + damage.ZIP + damage.PICKLE * 2, _strict)


def baseline_npz(folder: Path) -> Reader:
    path = folder / "baseline.npz"
    wanted = {"model": "0" * 16, "dataset": "text.jsonl", "dataset_size": "96", "batchsize": "4"}
    baseline.save(path, [3 + i / 7 for i in range(24)], wanted)
    return Reader("baseline .npz", [path], lambda: baseline.load(path, wanted),
                  damage.BYTES + damage.ZIP + damage.NPY, lambda losses: len(losses) == 24 and
                  all(map(math.isfinite, losses)))


def task_file(folder: Path) -> Reader:
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps({"context": f"Question {i}: é\nAnswer:", "choices": [" yes", " no", " ☃"],
                                        "gold": i % 3}, ensure_ascii=i % 2 == 0) + "\n" for i in range(9)))
    return Reader("task file", [path], lambda: tasks.read_items(str(path)), damage.BYTES + damage.JSON * 5,
                  lambda items: not any(map(tasks._flaw, items)))


TEXTS = [f"Document {i} says é and ☃.\nIt goes on {i}." for i in range(12)]


def _text_reader(name: str, files: list[Path], source: Path, damages: tuple) -> Reader:
    return Reader(name, files, lambda: list(data.documents(str(source))), damages,
                  lambda texts: all(isinstance(text, str) and text.encode() is not None for text in texts))


def text_jsonl(folder: Path) -> Reader:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": len(text)}) + "\n" for text in TEXTS))
    return _text_reader("text .jsonl", [path], path, damage.BYTES + damage.JSON * 5)


def text_gz(folder: Path) -> Reader:
    path = folder / "text.json.gz"
    path.write_bytes(damage.gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    return _text_reader("text .json.gz", [path], path, damage.BYTES + damage.GZIP)


def text_txt(folder: Path) -> Reader:
    path = folder / "text.txt"
    path.write_text("\n\n".join(TEXTS))
    return _text_reader("text .txt", [path], path, damage.BYTES)


def text_parquet(folder: Path) -> Reader:
    path = folder / "text.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), path)
    return _text_reader("text .parquet", [path], path, damage.BYTES)


def text_saved(folder: Path) -> Reader:
    import datasets
    datasets.disable_progress_bars()
    path = folder / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(path)
    files = [path / "dataset_dict.json", path / "train" / "state.json", path / "train" / "data-00000-of-00001.arrow"]
    return _text_reader("text of save_to_disk", files, path, damage.BYTES + damage.JSON * 3)


def evaluation(folder: Path) -> Reader:
    path, other = folder / "evaluation.json", folder / "other.json"
    task = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.4, "acc_norm_stderr": None, "items": 9, "source": "file 0"}
    record = {"sparsity_type": "2:4", "density": 0.5, "ppl": 9.5, "text": "a/b.txt", "windows": 3, "seqlen": 8,
              "fingerprint": "0" * 16, "tasks": {"quiz": task, "other": task}, "mean_acc": 0.5}
    for file in (path, other):
        file.write_text(json.dumps(record, indent=1))

    def sound(table: str) -> bool:
        lines = table.split("\n\nNot all were measured alike")[0].split("\n")
        return len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    return Reader("evaluation.json", [path], lambda: evaluate.comparison([str(path), str(other)]),
                  damage.BYTES + damage.JSON * 8, sound)


def run_folder(folder: Path) -> Reader:
    run = folder / "run"
    run.mkdir()
    step = {"loss": 3.5, "baseline": 3.6, "advantage": 0.1, "delta": None, "seconds": 1.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, **step}) + "\n" for i in range(12)))
    layers = {"a.0.b": 3, "a.1.b": 4}
    state = {"changed": layers, "entropy": layers, "blocks": layers}
    (run / "layers.jsonl").write_text("".join(json.dumps({"step": i, **state}) + "\n" for i in (6, 12)))
    (run / "run.json").write_text(json.dumps({"arguments": {"sparsity_type": [2, 4]}, "environment": {}}))

    def read():
        metrics = plot.read_lines(run / "metrics.jsonl", plot.is_step)
        layers = plot.read_lines(run / "layers.jsonl", plot.is_state)
        return figures.curves(metrics, layers), list(map(figures.layer_grid, layers)), plot.most_nats(run / "run.json")
    return Reader("run folder", sorted(run.iterdir()), read, damage.BYTES + damage.JSON * 8,
                  lambda found: isinstance(found[2], float))


def prune_record(folder: Path) -> Reader:
    path = folder / "prune.json"
    path.write_text(json.dumps({"arguments": {"model": "some/model", "seed": 0}, "summary": {"seconds": 1}}, indent=1))
    return Reader("prune.json", [path], lambda: get_mask.base_model(str(folder)), damage.BYTES + damage.JSON * 8,
                  lambda name: isinstance(name, str))


def model_folder(folder: Path) -> Reader:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny import make_gpt2
    make_gpt2(folder / "model")
    path, args = folder / "model", get_mask.parse_args(["--model", str(folder / "model")])
    names = _tensor_names(path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.safetensors")}
    (path / "model.safetensors").rename(path / "weights.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

    def read():
        model, tokenizer = load_model(args)
        weights = model.get_input_embeddings().weight
        return model_fingerprint(model), float(weights.double().sum()), tokenizer("The quiet fox").input_ids
    return Reader("model folder", sorted(path.iterdir()), read, damage.BYTES + damage.JSON * 8,
                  lambda found: len(found[0]) == 16, share=0.1)


def _tensor_names(path: Path) -> list[str]:
    raw = path.read_bytes()
    header = json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
    return [name for name in header if name != "__metadata__"]


READERS = (mask_safetensors, mask_npz, mask_folder, baseline_npz, task_file, text_jsonl, text_gz, text_txt,
           text_parquet, text_saved, evaluation, run_folder, prune_record, model_folder)


# --------------------------------------------------------------------------------------------------------- the campaign

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


def add_arguments(parser) -> None:
    parser.add_argument("--inputs", type=int, default=None, help="damaged files a reader (default: 1000, --quick: 50)")
    parser.add_argument("--readers", default="", help="only those whose names contain this")


def run(args) -> tuple[list[dict], list[str]]:
    np.seterr(all="ignore")
    inputs = args.inputs or (50 if args.quick else 1000)
    chosen = [make for make in READERS if args.readers.replace(" ", "_") in make.__name__]
    return campaign(inputs, args.seed, chosen, Path("results/fuzz"))


if __name__ == "__main__":
    parser = common.parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, wrong = run(args)
    common.report(rows, args, "\n".join(wrong))
    sys.exit(bool(wrong))
