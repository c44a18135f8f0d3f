"""The files that are damaged, and how each is read: one `Reader` for every format that scripts take from outside."""
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow
import tiny
import torch
from pyarrow import parquet

import plot
from evaluation import zero_shot
from evaluation.comparison import comparison
from faults import damage
from files import mask_files, permutation_files
from files.documents import documents
from files.model_folder import base_model
from files.packing import count_faults
from files.records import read_lines
from models.loading import load_model, model_fingerprint
from training import baselines, figures

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


# ------------------------------------------------------------------------------------------------- masks and baselines

def _masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(out * width // 4, 4, generator=generator).argsort(1).lt(2).view(out, width)
            for name, (out, width) in SHAPES.items()}


def _found(found: mask_files.MaskFile):
    return {name: mask.numpy().tobytes() for name, mask in found.masks.items()}, found.n, found.m, found.fingerprint


def _strict(found) -> bool:
    masks, n, m, _ = found
    return all(not count_faults(torch.frombuffer(bytearray(raw), dtype=torch.bool).view(SHAPES[name]), n, m)
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


def permutation(folder: Path) -> Reader:
    path, shapes = folder / "model.permutation.safetensors", {"residual": (1, 32), "model.layers.0.value": (2, 8)}
    orders = {name: torch.rand(shape, generator=torch.Generator().manual_seed(0)).argsort(1)
              for name, shape in shapes.items()}
    permutation_files.save(path, permutation_files.PermutationFile(orders, "some/model", "0" * 16))

    def read():
        found = permutation_files.load(path)
        return {name: order.tolist() for name, order in found.orders.items()}, found.model, found.model_fingerprint
    return Reader("permutation", [path], read, damage.BYTES + damage.SAFETENSORS * 3, None)


def baseline_npz(folder: Path) -> Reader:
    path = folder / "baseline.npz"
    wanted = {"model": "0" * 16, "dataset": "text.jsonl", "dataset_size": "96", "batchsize": "4"}
    baselines.save(path, [3 + i / 7 for i in range(24)], wanted)
    return Reader("baseline .npz", [path], lambda: baselines.load(path, wanted),
                  damage.BYTES + damage.ZIP + damage.NPY, lambda losses: len(losses) == 24 and
                  all(map(math.isfinite, losses)))


# --------------------------------------------------------------------------------------------------------------- texts

def task_file(folder: Path) -> Reader:
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps({"context": f"Question {i}: é\nAnswer:", "choices": [" yes", " no", " ☃"],
                                        "gold": i % 3}, ensure_ascii=i % 2 == 0) + "\n" for i in range(9)))
    return Reader("task file", [path], lambda: zero_shot.read_items(str(path)), damage.BYTES + damage.JSON * 5,
                  lambda items: not any(map(zero_shot._flaw, items)))


TEXTS = [f"Document {i} says é and ☃.\nIt goes on {i}." for i in range(12)]


def _text_reader(name: str, files: list[Path], source: Path, damages: tuple) -> Reader:
    return Reader(name, files, lambda: list(documents(str(source))), damages,
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
    datasets.disable_progress_bars()
    path = folder / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(path)
    files = [path / "dataset_dict.json", path / "train" / "state.json", path / "train" / "data-00000-of-00001.arrow"]
    return _text_reader("text of save_to_disk", files, path, damage.BYTES + damage.JSON * 3)


# -------------------------------------------------------------------------------------------------- records and models

def evaluation_record(folder: Path) -> Reader:
    path, other = folder / "evaluation.json", folder / "other.json"
    task = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.4, "acc_norm_stderr": None, "items": 9, "source": "file 0"}
    record = {"sparsity_type": "2:4", "density": 0.5, "ppl": 9.5, "text": "a/b.txt", "windows": 3, "seqlen": 8,
              "fingerprint": "0" * 16, "tasks": {"quiz": task, "other": task}, "mean_acc": 0.5}
    record["later"] = [{**record, "ppl": 8.5, "bos": True}]
    for file in (path, other):
        file.write_text(json.dumps(record, indent=1))

    def sound(table: str) -> bool:
        lines = table.split("\n\nNot all were measured alike")[0].split("\n")
        return len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    return Reader("evaluation.json", [path], lambda: comparison([str(path), str(other)]),
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
        metrics = read_lines(run / "metrics.jsonl", plot.is_step)
        layers = read_lines(run / "layers.jsonl", plot.is_state)
        return figures.curves(metrics, layers), list(map(figures.layer_grid, layers)), plot.most_nats(run / "run.json")
    return Reader("run folder", sorted(run.iterdir()), read, damage.BYTES + damage.JSON * 8,
                  lambda found: isinstance(found[2], float))


def prune_record(folder: Path) -> Reader:
    path = folder / "prune.json"
    path.write_text(json.dumps({"arguments": {"model": "some/model", "seed": 0}, "summary": {"seconds": 1}}, indent=1))
    return Reader("prune.json", [path], lambda: base_model(str(folder)), damage.BYTES + damage.JSON * 8,
                  lambda name: isinstance(name, str))


def model_folder(folder: Path) -> Reader:
    path = Path(tiny.make_gpt2(folder / "model"))
    names = _tensor_names(path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.safetensors")}
    (path / "model.safetensors").rename(path / "weights.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

    def read():
        model, tokenizer = load_model(model=str(path), dtype="checkpoint", device="cpu")
        weights = model.get_input_embeddings().weight
        return model_fingerprint(model), float(weights.double().sum()), tokenizer("The quiet fox").input_ids
    return Reader("model folder", sorted(path.iterdir()), read, damage.BYTES + damage.JSON * 8,
                  lambda found: len(found[0]) == 16, share=0.1)


def _tensor_names(path: Path) -> list[str]:
    raw = path.read_bytes()
    header = json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
    return [name for name in header if name != "__metadata__"]


READERS = (mask_safetensors, mask_npz, mask_folder, permutation, baseline_npz, task_file, text_jsonl, text_gz, text_txt,
           text_parquet, text_saved, evaluation_record, run_folder, prune_record, model_folder)
