"""What learning the mask of a model takes, before a GPU is rented: memory a device, bytes on the wire, time a step.

    python bench/plan.py --model llama2-70b --gpus 8 --gpu h100
    python bench/plan.py --model FOLDER --gpus 1 --gpu h200 --logits_dtype float16
    python bench/plan.py --check [--quick] [--json FILE]      # the memory it predicts against what is used here

--model names a shape (see common.SHAPES) or a folder with a config.json. Layouts:

    replicas      every GPU has the whole model and all logits; --samples or minibatches are split over them
    sharded       --shard: as replicas, but each layer's rows are shared out; a decoder layer is gathered to compute
    device_map    one process, the layers spread over the GPUs, which work one after another
    offload       the learned layers' weights, logits and masks in the host's memory, one masked layer sent at a time

Memory is a sum over tensors. Time is arithmetic: matrix products at --matmul of the data sheet's dense 16-bit rate, the
mask step's bytes at --bandwidth of that of the memory, the wire at the link's rate; no overlap. The data sheets' rates
are not measured here, and the shares are guesses to be replaced by what bench/step.py finds on your card.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import common
from utils import DTYPES, UserError, arguments_of, run_script

import memory
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from models.layers import find_layers, weight_matrix
from training.normalization import NORMALIZATIONS

GIB = 2**30
DEVICES = {  # bytes of memory; data sheet: dense 16-bit FLOP/s, memory bytes/s, link to the others, link to the host
    "a100": dict(memory=80e9, flops=312e12, bandwidth=2.04e12, link=300e9, host=25e9),
    "h100": dict(memory=80e9, flops=989e12, bandwidth=3.35e12, link=450e9, host=55e9),
    "h200": dict(memory=141e9, flops=989e12, bandwidth=4.8e12, link=450e9, host=55e9)}


LAYOUTS = ("replicas", "sharded", "device_map", "offload")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="llama2-7b", help="a shape's name or a folder with a config.json")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", choices=list(DEVICES), default="h100")
    parser.add_argument("--batchsize", type=int, default=32, help="sequences in a minibatch")
    parser.add_argument("--microbatch", type=int, default=32, help="sequences in a forward pass")
    parser.add_argument("--sqlen", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--m", type=int, default=4, help="M of N:M")
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--normalize_gradient", choices=list(NORMALIZATIONS), default="layer", help="as of train.py")
    parser.add_argument("--matmul", type=float, default=0.5, help="share of the data sheet's FLOP/s")
    parser.add_argument("--bandwidth", type=float, default=0.8, help="share of the data sheet's memory bandwidth")
    parser.add_argument("--host_bandwidth", type=float, default=100e9, help="bytes/s of the host's memory")
    parser.add_argument("--check", action="store_true", help="hold the memory against what is used on this CPU")
    return parser.parse_args(argv)


@dataclass
class ModelSize:
    """Numbers of a model: its weights in all, those learned, those of the largest learned layer; decoder layers, widths
    of the residual stream, of the vocabulary and of the MLP; bytes of a weight."""
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
        """Of a model, which may be on the meta device."""
        learned = [weight_matrix(module).numel() for module in find_layers(model, [""]).values()]
        config = model.config.get_text_config()
        return cls(weights=sum(parameter.numel() for parameter in model.parameters()), learned=sum(learned),
                   largest=max(learned), layers=config.num_hidden_layers, hidden=config.hidden_size,
                   vocabulary=config.vocab_size,
                   inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


@dataclass
class Settings:
    """Of a run: the minibatch's sequences and tokens, M of N:M, the dtype of the logits, how gradients are measured."""
    batchsize: int
    microbatch: int
    sqlen: int
    m: int = 4
    logits_dtype: str = "float16"
    normalize_gradient: str = "layer"

    @property
    def tokens(self) -> int:
        """Of a minibatch."""
        return self.batchsize * self.sqlen

    @property
    def logits_itemsize(self) -> int:
        return DTYPES[self.logits_dtype].itemsize

    @property
    def measured_bytes(self) -> float:
        """A weight, of the gradients' mean squares: one a block, or one a layer."""
        return torch.float32.itemsize / self.m if self.normalize_gradient == "block" else 0.0


@dataclass
class Rates:
    """Of a device: bytes of memory, FLOP/s, and bytes/s of its memory, of the link to other devices, of that to the
    host, and of the host's memory."""
    memory: float
    flops: float
    bandwidth: float
    link: float
    host: float
    host_memory: float


def memory_bytes(size: ModelSize, settings: Settings, gradients: bool, processes: int = 1) -> dict[str, float]:
    """Of one process: tensor bytes by what they are for. processes: that FSDP shares the layers out to; alone it has
    the whole model."""
    sequences = min(settings.microbatch, settings.batchsize)
    tokens = sequences * settings.sqlen
    width = 1 if settings.m <= 8 else 4
    wide, head = tokens * size.itemsize, tokens * size.vocabulary * size.itemsize
    packed = size.vocabulary * size.hidden * size.itemsize  # the head's weight, laid out anew by the CPU's library
    sequence = settings.sqlen * size.vocabulary
    body = wide * (4 * size.hidden + 4 * size.inner)  # what one decoder layer has at a time
    own, copies = size.learned / processes, size.weights - size.learned
    found = {"weights": (copies + own) * size.itemsize, "logits": own * settings.logits_itemsize,
             "masks": own / settings.m * width, "mean squares": own * settings.measured_bytes * gradients,
             "scratch": 0 if processes > 1 else size.largest * size.itemsize}
    # of a sharded decoder layer: rows sent, gathered twice, the layer; backward: its gradient, and that sent; in the
    # head's turn: what the last layer's gather left
    gathered = size.learned / size.layers * size.itemsize if processes > 1 else 0
    at_work = gathered * ((5 if gradients else 3) + 1 / processes)
    if gradients:  # each layer's input; predictions of student and teacher, their gradient; a copy of it, or parts
        kept = size.layers * wide * size.hidden
        once = 3 * body + size.largest * (size.itemsize + 8)  # a layer again, and the gradient of its weight
        activations = kept + 3 * head + max(once + at_work, max(sequence * 16, head + packed) + gathered)
    else:  # predictions; of 4 sequences at a time in float32, with their log-probabilities
        in_head = wide * size.hidden + max(min(4, sequences) * sequence * 8, packed)
        activations = max(body + at_work, head + in_head + gathered)
    return {**found, "activations": activations}


def layout_costs(layout: str, size: ModelSize, settings: Settings, parts: dict[str, float], gpus: int,
                 gradients: bool) -> tuple[float, float, float]:
    """Bytes: on a GPU, on the host, and on the wire in a step. parts: see `memory_bytes`."""
    everything, weights = sum(parts.values()), size.learned * size.itemsize
    others = (gpus - 1) / gpus
    host = packed_bytes(size) + size.weights * size.itemsize  # m0, and the model while it is loaded
    passes = forward_passes(gradients)
    if layout == "replicas":
        wire = (2 * others * weights if gradients else 40.0) * (gpus > 1)
        return everything, host * gpus, wire
    if layout == "sharded":  # gathered for each pass but the recomputed one, and gradients go to the rows' owners
        return everything, packed_bytes(size) * gpus, (4 if gradients else 1) * others * weights
    if layout == "device_map":
        spread = sum(parts[name] for name in ("weights", "logits", "masks", "mean squares"))
        wire = passes * (gpus - 1) * settings.tokens * size.hidden * size.itemsize
        return spread / gpus + everything - spread, host, wire
    here = everything - (parts["logits"] + parts["masks"] + weights)  # the head, the embeddings and norms stay
    return here, packed_bytes(size) + everything - here, weights


def packed_bytes(size: ModelSize) -> float:
    """Of m0 as train.py keeps it in the host's memory, at 2:4."""
    return size.learned / 4 * math.log2(6) / 8


def forward_passes(gradients: bool) -> int:
    """What a step computes, in forward passes: teacher, forward, that again, and backward for two."""
    return 5 if gradients else 1


def layout_row(layout: str, size: ModelSize, settings: Settings, rates: Rates, gpus: int, gradients: bool) -> dict:
    """The table's row of a layout and a way of learning."""
    parts = memory_bytes(size, settings, gradients, gpus if layout == "sharded" else 1)
    here, host, wire = layout_costs(layout, size, settings, parts, gpus, gradients)
    compute = forward_passes(gradients) * 2 * size.weights * settings.tokens / rates.flops
    measured = 2 * settings.measured_bytes * gradients
    step_bytes = size.learned * (2 * settings.logits_itemsize + 2 / settings.m + 2 * size.itemsize + measured)
    if layout == "offload":
        step = step_bytes / rates.host_memory
    else:
        step = step_bytes / rates.bandwidth * (1.5 if gradients else 1) / (gpus if layout == "sharded" else 1)
    seconds = compute + step + wire / (rates.host if layout == "offload" else rates.link)
    processes = gpus if layout in ("replicas", "sharded") else 1  # each with a minibatch of its own
    return {"learning": "straight_through" if gradients else "forward-only", "layout": layout,
            "GiB a GPU": here / GIB, "fits": "yes" if here < 0.92 * rates.memory else "no", "host GiB": host / GIB,
            "wire a step": in_units(wire), "forward and backward (s)": compute, "mask step (s)": step,
            "step (s)": seconds, "sequences a second": processes * settings.batchsize / seconds}


def plan(size: ModelSize, settings: Settings, rates: Rates, gpus: int) -> list[dict]:
    """A row for each layout and way of learning that there is."""
    rows = []
    for gradients in (False, True):
        for layout in LAYOUTS:
            alone = layout in ("sharded", "device_map") and gpus == 1
            if not alone and not (gradients and layout == "offload"):
                rows.append(layout_row(layout, size, settings, rates, gpus, gradients))
    return rows


def in_units(size: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def described(name: str) -> nn.Module:
    """A model of that shape or config.json without weights."""
    if name in common.SHAPES:
        return common.random_llama(name, "meta", torch.bfloat16)
    if not Path(name, "config.json").is_file():
        raise UserError(f"--model {name} is neither a folder with a config.json nor one of {', '.join(common.SHAPES)}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))


def check(shapes: list[str]) -> list[dict]:
    """Rows of the memory that is predicted and used, on the CPU, by what bench/memory.py runs."""
    rows, settings = [], Settings(batchsize=8, microbatch=8, sqlen=128, m=4, logits_dtype="float32")
    for shape in shapes:
        size = ModelSize.of(described(shape))
        for way, gradients in (("forward-only", False), ("straight_through, checkpointing, distillation", True)):
            for processes in (1, 2):
                said = sum(memory_bytes(size, settings, gradients, processes).values()) + packed_bytes(size)
                used = memory.measured_bytes(shape, way, processes=processes)
                rows.append({"model": shape, "learning": way, "processes": processes, "predicted (MiB)": said / 2**20,
                             "used (MiB)": used / 2**20, "predicted / used": said / used})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.check:
        shapes = ["smollm2-135m"] if args.quick else ["smollm2-135m", "llama3.2-1b"]
        args.device = "cpu"
        common.report(check(shapes), args, "8 sequences of 128 tokens, 2:4, bfloat16 weights, float32 logits, resident "
                                           "memory over that of the libraries")
        return
    size, sheet = ModelSize.of(described(args.model)), DEVICES[args.gpu]
    rates = Rates(**{**sheet, "flops": args.matmul * sheet["flops"], "bandwidth": args.bandwidth * sheet["bandwidth"]},
                  host_memory=args.host_bandwidth)
    common.report(plan(size, Settings(**arguments_of(Settings, args)), rates, args.gpus), args,
                  f"{args.model}: {size.weights / 1e9:.4g} G weights, {size.learned / 1e9:.4g} G of them learned, "
                  f"on {args.gpus} x {args.gpu}; {args.batchsize} x {args.sqlen} tokens a minibatch, "
                  f"{args.logits_dtype} logits; fits: under 92 % of the memory")


if __name__ == "__main__":
    run_script(main)
