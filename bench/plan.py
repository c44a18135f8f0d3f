"""Estimates what learning a model's mask needs, before a GPU is rented: memory per GPU, traffic
between GPUs, time of a step.

    python bench/plan.py --model llama2-70b --gpus 8 --gpu h100 --logits_dtype float16
    python bench/plan.py --model FOLDER --gpu rtx4090

--model is the name of a shape (SHAPES) or a folder with a config.json. Several GPUs can be
used in these ways:

    replicas             each GPU has the whole model and all logits, and takes its own minibatch
    sharded              --shard: each GPU has a part of each layer's rows; a decoder layer is
                         gathered to compute
    one after another    --device auto: one process; the layers are spread over the GPUs

Memory is a sum of tensors; bench/memory.py compares it with measured memory. Time is arithmetic and
not measured: matrix products at MATMUL times the data sheet's rate, the mask step at BANDWIDTH
times the memory's rate, and traffic at the link's rate, without overlap.
"""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path

import common
from models.layers import find_layers, weight_matrix
from models.machine import DTYPES
from utils import UserError, run_script

import torch
from random_models import SHAPES, random_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

GIB = 2**30
# from data sheets: memory in bytes, dense 16-bit FLOP/s, bytes/s of memory and of the link to GPUs
DEVICES = {
    "rtx4090": dict(memory=24e9, flops=165e12, bandwidth=1.01e12, link=32e9),
    "a100": dict(memory=80e9, flops=312e12, bandwidth=2.04e12, link=300e9),
    "h100": dict(memory=80e9, flops=989e12, bandwidth=3.35e12, link=450e9),
    "h200": dict(memory=141e9, flops=989e12, bandwidth=4.8e12, link=450e9),
}
# guessed shares of the data sheet's rates
MATMUL = 0.5
BANDWIDTH = 0.8
LAYOUTS = ("replicas", "sharded", "one after another")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--model", default="llama2-7b", help="name of a shape, or a folder with a config.json"
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", choices=list(DEVICES), default="h100")
    parser.add_argument("--batchsize", type=int, default=32, help="sequences in a minibatch")
    parser.add_argument("--microbatch", type=int, default=32, help="sequences in a forward pass")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--m", type=int, default=4, help="M of N:M")
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float32")
    return parser.parse_args(argv)


@dataclass
class ModelSize:
    """A model's numbers of weights (all, with a mask, in the largest masked layer), decoder layers,
    residual channels, tokens in the vocabulary and MLP channels, and the bytes per weight."""

    weights: int
    learned: int
    largest: int
    layers: int
    hidden: int
    vocabulary: int
    inner: int
    itemsize: int = 2

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """Return the size of a model, which may be on the meta device."""
        learned = [weight_matrix(module).numel() for module in find_layers(model).values()]
        config = model.config.get_text_config()
        return cls(
            weights=sum(parameter.numel() for parameter in model.parameters()),
            learned=sum(learned),
            largest=max(learned),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        )


@dataclass
class Settings:
    """A run's settings: sequences per minibatch and per forward pass, tokens per sequence, M of
    N:M, dtype of the logits."""

    batchsize: int
    microbatch: int
    seqlen: int
    m: int = 4
    logits_dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Tokens per minibatch."""
        return self.batchsize * self.seqlen

    @property
    def logits_itemsize(self) -> int:
        """Bytes per logit."""
        return DTYPES[self.logits_dtype].itemsize


def memory_bytes(
    size: ModelSize, settings: Settings, gradients: bool, processes: int = 1
) -> dict[str, float]:
    """Return the bytes of the tensors of one process, by their purpose. gradients: True to learn
    with gradients, checkpointing and distillation, False from forward passes only. processes: how
    many processes split each layer's rows."""
    sequences = min(settings.microbatch, settings.batchsize)
    tokens = sequences * settings.seqlen
    width = 1 if settings.m <= 8 else 4
    wide = tokens * size.itemsize
    head = tokens * size.vocabulary * size.itemsize
    # the CPU's matrix library copies the head's weight
    packed = size.vocabulary * size.hidden * size.itemsize
    sequence = settings.seqlen * size.vocabulary
    body = wide * (4 * size.hidden + 4 * size.inner)  # activations of one decoder layer
    own = size.learned / processes
    copies = size.weights - size.learned
    found = {
        "weights": (copies + own) * size.itemsize,
        "logits": own * settings.logits_itemsize,
        "masks": own / settings.m * width,
        "mean squares": own / settings.m * 2 if gradients else 0,
        "scratch": 0 if processes > 1 else size.largest * size.itemsize,
    }
    # a sharded decoder layer: the rows sent, two gathered buffers, the layer; in backward its
    # gradient, twice. While the head computes, the last layer's gathered buffer is still held.
    gathered = size.learned / size.layers * size.itemsize if processes > 1 else 0
    at_work = gathered * ((5 if gradients else 3) + 1 / processes)
    if gradients:  # inputs of the layers; predictions of student and teacher, their gradient
        kept = size.layers * wide * size.hidden
        # one recomputed layer, and the gradient of its weight
        once = 3 * body + size.largest * (size.itemsize + 8)
        activations = (
            kept + 3 * head + max(once + at_work, max(sequence * 16, head + packed) + gathered)
        )
    else:  # predictions; float32 copies of 4 sequences at a time
        in_head = wide * size.hidden + max(min(4, sequences) * sequence * 8, packed)
        activations = max(body + at_work, head + in_head + gathered)
    return {**found, "activations": activations}


def layout_costs(
    layout: str,
    size: ModelSize,
    settings: Settings,
    parts: dict[str, float],
    gpus: int,
    gradients: bool,
) -> tuple[float, float, float]:
    """Return the bytes on each GPU, on the host, and sent per step. parts: from `memory_bytes`."""
    everything = sum(parts.values())
    weights = size.learned * size.itemsize
    others = (gpus - 1) / gpus
    host = packed_bytes(size) + size.weights * size.itemsize  # m0, and the model during loading
    passes = forward_passes(gradients)
    if layout == "replicas":
        wire = (2 * others * weights if gradients else 40.0) * (gpus > 1)
        return everything, host * gpus, wire
    # every pass but the recomputed one gathers the layers; gradients go to the rows' owners
    if layout == "sharded":
        host += packed_bytes(size) * (gpus - 1)  # one process loads the model
        return everything, host, (4 if gradients else 1) * others * weights
    spread = sum(parts[name] for name in ("weights", "logits", "masks", "mean squares"))
    wire = passes * (gpus - 1) * settings.tokens * size.hidden * size.itemsize
    return spread / gpus + everything - spread, host, wire


def packed_bytes(size: ModelSize) -> float:
    """Return the bytes of the packed 2:4 mask m0, which stays in the host's memory."""
    return size.learned / 4 * math.log2(6) / 8


def forward_passes(gradients: bool) -> int:
    """Return the work of a step in forward passes. With gradients it is: teacher, forward,
    recomputed forward, backward (two)."""
    return 5 if gradients else 1


def layout_row(
    layout: str,
    size: ModelSize,
    settings: Settings,
    rates: dict[str, float],
    gpus: int,
    gradients: bool,
) -> dict:
    """Return the table's row for a layout and a way to learn."""
    parts = memory_bytes(size, settings, gradients, gpus if layout == "sharded" else 1)
    here, host, wire = layout_costs(layout, size, settings, parts, gpus, gradients)
    compute = (
        forward_passes(gradients) * 2 * size.weights * settings.tokens / (MATMUL * rates["flops"])
    )
    step_bytes = size.learned * (2 * settings.logits_itemsize + 2 / settings.m + 2 * size.itemsize)
    if gradients:  # the blocks' mean squares; the logits, twice more in the half with soft masks
        step_bytes += size.learned * (4 / settings.m + settings.logits_itemsize)
    parallel = gpus if layout == "sharded" else 1
    step = step_bytes / (BANDWIDTH * rates["bandwidth"]) * (1.5 if gradients else 1) / parallel
    seconds = compute + step + wire / rates["link"]
    processes = gpus if layout in ("replicas", "sharded") else 1  # each has its own minibatch
    return {
        "learning": "backward passes" if gradients else "forward-only",
        "layout": layout,
        "GiB a GPU": here / GIB,
        "fits": "yes" if here < 0.92 * rates["memory"] else "no",
        "host GiB": host / GIB,
        "wire a step": in_units(wire),
        "forward and backward (s)": compute,
        "mask step (s)": step,
        "step (s)": seconds,
        "sequences a second": processes * settings.batchsize / seconds,
    }


def plan(size: ModelSize, settings: Settings, rates: dict[str, float], gpus: int) -> list[dict]:
    """Return the table's rows: each way to learn in each layout; a single GPU has only
    "replicas"."""
    rows = []
    for gradients in (False, True):
        for layout in LAYOUTS:
            if layout == "replicas" or gpus > 1:
                rows.append(layout_row(layout, size, settings, rates, gpus, gradients))
    return rows


def in_units(size: float) -> str:
    """Format bytes in the largest fitting unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def described(name: str) -> nn.Module:
    """Return a model without weights, from a shape's name or a folder with a config.json."""
    if name in SHAPES:
        return random_llama(name, "meta", torch.bfloat16)
    if not Path(name, "config.json").is_file():
        raise UserError(
            f"--model {name} is neither a folder with a config.json nor one of {', '.join(SHAPES)}"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    size = ModelSize.of(described(args.model))
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    common.report(
        plan(size, settings, DEVICES[args.gpu], args.gpus),
        args,
        f"{args.model}: {size.weights / 1e9:.4g} G weights, {size.learned / 1e9:.4g} G of them "
        f"with a mask, on {args.gpus} x {args.gpu}; {args.batchsize} x {args.seqlen} tokens a "
        f"minibatch, {args.logits_dtype} logits; fits: below 92 % of the memory",
    )


if __name__ == "__main__":
    run_script(main)
