"""Runs of train.py on the tiny Llama: how to start one, and what is read from it."""
import json
from types import SimpleNamespace

import transformers
from safetensors.torch import load_file

import data
import train
from files import mask_files
from masking.layers import apply_masks
from models.layers import find_layers
from models.loss import batch_loss

GRADIENTS = "--estimator straight_through --logits 1 --lr 0.3 --tokens 768 --epoch 1"  # six minibatches


def run_train(out, folder, model, flags):
    """Its metrics, layers.jsonl, run.json, masks and logits; folder: conftest.py's text_and_masks."""
    train.main(f"--model {model} --dtype float32 --device cpu --dataset {folder}/text.jsonl --batchsize 4 --sqlen 32 "
               f"--step eager --skip_checkpoint --save --mask {folder}/2_4.safetensors --out {out} {flags}".split())
    return SimpleNamespace(
        folder=out, metrics=[strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
        layers=[strict(line) for line in (out / "layers.jsonl").read_text().splitlines()],
        record=strict((out / "run.json").read_text()), masks=mask_files.load(out / "mask.safetensors").masks,
        logits={name: planes.T for name, planes in load_file(out / "logits.safetensors").items()})


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""
    def refuse(constant):
        raise ValueError(f"{constant} in {text[:200]}")
    return json.loads(text, parse_constant=refuse)


def column(run, key):
    return [line[key] for line in run.metrics]


def sequences_of(folder, models, tokens, seed=0):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["llama"])
    return data.token_sequences(tokenizer, str(folder / "text.jsonl"), tokens, 4, 32, seed)


def loss_under(models, masks, sequences):
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    apply_masks(find_layers(model), masks)
    return batch_loss(model, sequences)
