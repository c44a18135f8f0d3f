"""What test_bad_input.py is made of: commands that work, files that do not, and what a proper
refusal is."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import ModuleType

from files import mask_files

import numpy as np
import pytest
import torch
from runs import SCRIPTS
from safetensors.torch import load_file, save_file
from tiny import write_corpus

ALL = ["prune", "get_mask", "inference_loss", "train", "sparsify", "eval"]
PLACE = "--model {w}/llama --dtype float32 --device cpu"
DATA = "--dataset {w}/text.jsonl --dataset_size 8 --batchsize 4 --seqlen 32"
COMMANDS = {
    "prune": f"{PLACE} --dataset {{w}}/text.jsonl --nsamples 2 --seqlen 32 --save_model new",
    "get_mask": "--model {w}/sparse --save new.safetensors",
    "inference_loss": f"{PLACE} {DATA} --mask {{w}}/mask.safetensors --save new.npz",
    "train": (
        f"{PLACE} {DATA} --mask {{w}}/mask.safetensors --baseline {{w}}/baseline.npz --max_step 2 "
        "--targets q_proj --out new"
    ),
    "sparsify": (
        f"{PLACE} --dataset {{w}}/text.jsonl --mask {{w}}/mask.safetensors --seqlen 32 "
        "--batchsize 4 --steps 2 --targets q_proj --out new"
    ),
    "eval": f"{PLACE} --ppl {{w}}/held_out.txt --seqlen 32 --nwindows 2 --save new.json",
    # it generates its text, after all refusals
    "alone": f"{PLACE} --seqlen 32 --batchsize 4 --steps 2 --out new",
    "compare": "--compare {w}/record.json {w}/record.json",
    "plot": "--out new {w}/run",
}


def script_of(command: str) -> ModuleType:
    """That of a command: its name, but for two."""
    return SCRIPTS[{"alone": "sparsify", "compare": "eval"}.get(command, command)]


def edited(source: Path, target: Path, change) -> None:
    """A copy of a model folder whose weights went through change(tensors)."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


def quietly(script: str, arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script_of(script).main(arguments.split())


def fill(w: Path, models: dict[str, Path]) -> None:
    """Whole and broken models, masks, texts and baselines, in this folder."""
    for kind in ("llama", "gpt2"):
        shutil.copytree(models[kind], w / kind)
    write_corpus(w / "text.jsonl", 12)
    write_corpus(w / "other.jsonl", 12, seed=5)
    write_corpus(w / "few.jsonl", 3)
    texts = [json.loads(line)["text"] for line in (w / "text.jsonl").read_text().splitlines()]
    (w / "held_out.txt").write_text(texts[0])
    (w / "short.txt").write_text(texts[0][:50])
    (w / "long.jsonl").write_text(
        "".join(json.dumps({"text": " ".join([text] * 3)}) + "\n" for text in texts)
    )

    edited(w / "llama", w / "other", lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    edited(w / "llama", w / "nan", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    edited(
        w / "llama",
        w / "inf",
        lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(torch.inf),
    )
    for name, file, content in [
        ("no_config", "config.json", None),
        ("bad_config", "config.json", b"{"),
        ("other_config", "config.json", b'{"model_type": "nonsense"}'),
        ("bert", "config.json", b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'),
        ("remote", "config.json", b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'),
        ("no_tokenizer", "tokenizer.model", None),
        ("no_weights", "model.safetensors", None),
        ("bad_weights", "model.safetensors", b"nonsense"),
    ]:
        shutil.copytree(w / "llama", w / name)
        (w / name / file).unlink()
        if content:
            (w / name / file).write_bytes(content)
    (w / "remote" / "own.py").write_text(f"open('{w}/ran', 'w')\n")  # code that nobody asked to run
    (w / "no_tokenizer" / "tokenizer_config.json").unlink()
    settings = json.loads((w / "llama" / "config.json").read_text())
    for name, change in [
        ("quantised", {"quantization_config": {"bits": 4}}),
        # transformers 5 reads the first key, 4 the second
        ("kernel", {"attn_implementation": "a/b", "_attn_implementation": "a/b"}),
        ("reordered", {"channel_permutation": "0123"}),
    ]:
        shutil.copytree(w / "llama", w / name)
        (w / name / "config.json").write_text(json.dumps(settings | change))
    edited(w / "llama", w / "few_weights", lambda tensors: tensors.pop("model.norm.weight"))
    edited(
        w / "llama",
        w / "few_rows",
        lambda tensors: tensors.update(
            {name: tensors[name][:32] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )
    (w / "few_rows" / "config.json").write_text(json.dumps(settings | {"vocab_size": 32}))

    for model, sparsity, sparse, mask in [
        ("llama", "2:4", "sparse", "mask"),
        ("llama", "4:8", "sparse8", "mask8"),
        ("other", "2:4", "sparse_other", "mask_other"),
        ("gpt2", "2:4", "sparse_gpt2", "mask_gpt2"),
    ]:
        quietly(
            "prune",
            f"--model {w}/{model} --dtype float32 --device cpu --prune_method magnitude "
            f"--sparsity_type {sparsity} --save_model {w}/{sparse}",
        )
        quietly(
            "get_mask",
            f"--model {w}/{sparse} --sparsity_type {sparsity} --save {w}/{mask}.safetensors",
        )
    found = mask_files.load(w / "mask.safetensors")
    attention = {name: mask for name, mask in found.masks.items() if "self_attn" in name}
    mask_files.save(w / "attention.safetensors", attention, 2, 4, found.model, found.fingerprint)
    mask_files.save(
        w / "flipped.safetensors",
        {name: ~mask for name, mask in found.masks.items()},
        2,
        4,
        found.model,
        found.fingerprint,
    )

    quietly("inference_loss", COMMANDS["inference_loss"].format(w=w) + f" --save {w}/baseline.npz")
    with np.load(w / "baseline.npz") as file:
        np.savez(w / "nan.npz", losses=file["losses"] * np.nan, depends_on=file["depends_on"])
    for whole in ("mask.safetensors", "baseline.npz"):
        (w / f"torn_{whole}").write_bytes((w / whole).read_bytes()[:-100])
    (w / "record.json").write_text(
        json.dumps({"sparsity_type": "2:4", "density": 0.5, "dtype": "float32"})
    )
    (w / "torn.json").write_text('{"sparsity_type":')
    (w / "run").mkdir()
    (w / "run" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 3.5, "baseline": 3.6}) + "\n"
    )
    for name in ("unfinished", "begun"):
        (w / name).mkdir()
        (w / name / "run.json").write_text("{}")
    (w / "model.gguf").touch()
    (w / "nothing").mkdir()
    (w / "standing").mkdir()
    for name in (
        "standing.json",
        "standing.npz",
        "standing.safetensors",
        "standing.png",
        "standing/file",
    ):
        (w / name).write_text("stands")


def snapshot(*folders: Path) -> dict:
    """Every file with its size and time, every folder."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in found
    }


def check_refusal(code, stderr, *words) -> None:
    """words: each must be in the line; of alternatives in a tuple, one."""
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    for word in words:
        alternatives = word if isinstance(word, tuple) else (word,)
        assert any(alternative in lines[0] for alternative in alternatives), (
            f"{alternatives} not in: {lines[0]}"
        )


def cases(*rows):
    """(scripts, flags, words...) -> a parameter for each script."""
    return pytest.mark.parametrize(
        "script, flags, words",
        [
            pytest.param(script, flags, words, id=f"{script} {flags}".replace("{w}/", ""))
            for scripts, flags, *words in rows
            for script in ([scripts] if isinstance(scripts, str) else scripts)
        ],
    )
