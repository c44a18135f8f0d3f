"""The scripts, and runs of train.py and sparsify.py on the tiny Llama: how to start and stop one,
what is read from it."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import train
from files import mask_files
from masking.layers import apply_masks
from models.layers import find_layers
from models.loss import batch_loss

import transformers
from safetensors.torch import load_file

SCRIPTS = {
    name: import_module(name)
    for name in (
        "prune",
        "get_mask",
        "inference_loss",
        "train",
        "sparsify",
        "eval",
        "generate_text",
        "plot",
        "permute",
    )
}
ROOT = Path(__file__).parent.parent
VANILLA = "--estimator vanilla --lr 0.1"


def arguments(workshop: Path, out: Path, flags: str = "") -> list[str]:
    """Of a run of train.py in the workshop of tests/faults/kill.py."""
    mask = "" if "--init random" in flags else f"--mask {workshop}/mask.safetensors"
    return (
        f"--model {workshop}/dense {mask} --dataset {workshop}/text.jsonl --dtype float32 "
        "--device cpu --dataset_size 8 --batchsize 2 --seqlen 24 --logits 1 --lr 5 --baseline "
        f"online --max_step 6 --targets q_proj --skip_checkpoint --checkpoint_every 1 --out {out} "
        f"{flags}"
    ).split()


def run_train(out, folder, model, flags):
    """A run of train.py; folder: conftest.py's text_and_masks."""
    mask = "" if "--init random" in flags else f"--mask {folder}/2_4.safetensors"
    train.main(
        f"--model {model} --dtype float32 --device cpu --dataset {folder}/text.jsonl "
        f"--dataset_size 8 --batchsize 4 --seqlen 32 {mask} --baseline online --logits 1 --lr 5 "
        f"--max_step 4 --save --out {out} {flags}".split()
    )
    return read_run(out)


def read_run(out):
    """Its metrics, run.json, masks and logits."""
    logits = out / "logits.safetensors"
    return SimpleNamespace(
        folder=out,
        metrics=[strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
        record=strict((out / "run.json").read_text()),
        masks=mask_files.load(out / "mask.safetensors").masks,
        logits={name: planes.T for name, planes in load_file(logits).items()}
        if logits.exists()
        else {},
    )


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} in {text[:200]}")

    return json.loads(text, parse_constant=refuse)


def column(run, key):
    return [line[key] for line in run.metrics]


def is_strict(masks, n=2, m=4):
    return bool(masks) and all((mask.reshape(-1, m).sum(1) == n).all() for mask in masks.values())


def loss_under(model, masks, sequences, bos=None):
    """Of the HF model of this folder; bos: a token to read before each sequence."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    apply_masks(find_layers(loaded), masks)
    return batch_loss(loaded, sequences, bos=bos)


# ------------------------------------------------------------------------------------------ stopped


def raises(error):
    def function(*_):
        raise error

    return function


def steps_of(run: Path) -> list[int]:
    log = run / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
    )


def states_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").iterdir())
