"""What learning the mask of a model takes, before a GPU is rented: memory a device, bytes on the wire, time a step.

    python bench/plan.py --model llama2-70b --gpus 8 --gpu h100
    python bench/plan.py --model FOLDER --gpus 1 --gpu h200 --logits_dtype float16
    python bench/plan.py --check [--quick] [--json FILE]      # the memory it predicts against what is used here

--model names a shape (see common.SHAPES) or a folder with a config.json. Layouts:

    replicas      every GPU has the whole model and all logits; --samples or minibatches are shared out
    sharded       --shard: as replicas, but the learned layers' rows are shared out; a layer is gathered to compute
    device_map    one process, the layers spread over the GPUs, which work one after another
    offload       the learned layers' weights, logits and masks in the host's memory, one masked layer sent at a time

Memory is a sum over tensors. Time is arithmetic: matrix products at --matmul of the data sheet's dense 16-bit rate, the
mask step's bytes at --bandwidth of that of the memory, the wire at the link's rate; no overlap. The data sheets' rates
are not measured here, and the shares are guesses to be replaced by what bench/step.py finds on your card.
"""
from pathlib import Path
from types import SimpleNamespace

import common
import memory
import torch

from utils import DTYPES, UserError, run

GIB = 2**30
DEVICES = {  # bytes of memory; data sheet: dense 16-bit FLOP/s, memory bytes/s, link to the others, link to the host
    "a100": dict(memory=80e9, flops=312e12, bandwidth=2.04e12, link=300e9, host=25e9),
    "h100": dict(memory=80e9, flops=989e12, bandwidth=3.35e12, link=450e9, host=55e9),
    "h200": dict(memory=141e9, flops=989e12, bandwidth=4.8e12, link=450e9, host=55e9)}


def measures(model, itemsize: int) -> SimpleNamespace:
    """Numbers of a model, which may be on the meta device: weights in all and learned, layers, widths."""
    from layers import find_layers, weight_matrix
    learned = [weight_matrix(module).numel() for module in find_layers(model, [""]).values()]
    config = model.config.get_text_config()
    return SimpleNamespace(
        weights=sum(parameter.numel() for parameter in model.parameters()), learned=sum(learned), largest=max(learned),
        layers=config.num_hidden_layers, hidden=config.hidden_size, vocabulary=config.vocab_size, itemsize=itemsize,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def memory_bytes(size, args, gradients: bool) -> dict[str, float]:
    """Of one process that has the whole model: tensor bytes by what they are for."""
    rows, tokens = min(args.microbatch, args.batchsize), min(args.microbatch, args.batchsize) * args.sqlen
    logits, width = DTYPES[args.logits_dtype].itemsize, 1 if args.m <= 8 else 4
    wide, head = tokens * size.itemsize, tokens * size.vocabulary * size.itemsize
    packed = size.vocabulary * size.hidden * size.itemsize  # the head's weight, laid out anew by the CPU's library
    row = args.sqlen * size.vocabulary
    body = wide * (4 * size.hidden + 4 * size.inner)  # what one decoder layer has at a time
    found = {"weights": size.weights * size.itemsize, "logits": size.learned * logits,
             "masks": size.learned / args.m * width, "scratch": size.largest * size.itemsize}
    if gradients:  # each layer's input; predictions of student and teacher, their slope; its copy, or rows of them
        kept = size.layers * wide * size.hidden
        once = 3 * body + size.largest * (size.itemsize + 8)  # a layer again, and the gradient of its weight
        activations = kept + max(once, 3 * head + max(row * 16, head + packed))
    else:  # predictions; of 4 rows at a time in float32, with their log-probabilities
        activations = max(body, head + wide * size.hidden + max(min(4, rows) * row * 8, packed))
    return {**found, "activations": activations}


def plan(size, device: dict, args) -> list[dict]:
    """A row for each layout and way of learning."""
    rows, count = [], args.gpus
    tokens = args.batchsize * args.sqlen
    logits = DTYPES[args.logits_dtype].itemsize
    forward = 2 * size.weights * tokens / (args.matmul * device["flops"])
    step_bytes = size.learned * (2 * logits + 2 / args.m + 2 * size.itemsize)
    for gradients in (False, True):
        parts = memory_bytes(size, args, gradients)
        spread = parts["weights"] + parts["logits"] + parts["masks"]
        passes = 5 if gradients else 1  # teacher, forward, that again, and backward for two
        compute = passes * forward
        whole_step = step_bytes / (args.bandwidth * device["bandwidth"]) * (1.5 if gradients else 1)
        for layout in ("replicas", "sharded", "device_map", "offload"):
            if layout in ("sharded", "device_map") and count == 1 or gradients and layout == "offload":
                continue
            here, wire, masks, step = sum(parts.values()), 0.0, count, whole_step
            host = size.learned + size.weights * size.itemsize  # m0, a byte a weight, and the model while it is loaded
            if layout == "replicas":
                host *= count
                wire = (2 * (count - 1) / count * size.learned * size.itemsize if gradients else 32.0) * (count > 1)
            elif layout == "sharded":  # gathered for each pass, and gradients go to the rows' owners
                step /= count
                owned = size.learned * size.itemsize + parts["logits"] + parts["masks"]
                here -= owned * (count - 1) / count
                wire = (5 if gradients else 1) * (count - 1) / count * size.learned * size.itemsize
            elif layout == "device_map":
                here, masks = spread / count + sum(parts.values()) - spread, 1
                wire = passes * (count - 1) * tokens * size.hidden * size.itemsize
            else:  # one process; the head, the embeddings and norms stay on the GPU
                masks = 1
                here -= parts["logits"] + parts["masks"] + size.learned * size.itemsize
                wire = size.learned * size.itemsize
                host = size.learned + sum(parts.values()) - here
                step = step_bytes / args.host_bandwidth
            link = device["host"] if layout == "offload" else device["link"]
            seconds = compute + step + wire / link
            rows.append({"learning": "straight_through" if gradients else "forward-only", "layout": layout,
                         "GiB a GPU": here / GIB, "fits": "yes" if here < 0.92 * device["memory"] else "no",
                         "host GiB": host / GIB,
                         "wire a step": _size(wire), "forward and backward (s)": compute, "mask step (s)": step,
                         "step (s)": seconds, "rows a second": masks * args.batchsize / seconds})
    return rows


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def described(name: str):
    """A model of that shape or config.json without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    if name in common.SHAPES:
        return common.random_llama(name, "meta", torch.bfloat16)
    if not Path(name, "config.json").is_file():
        raise UserError(f"--model {name} is neither a folder with a config.json nor one of {', '.join(common.SHAPES)}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))


def check(args) -> list[dict]:
    """Rows of the memory that is predicted and used, on the CPU."""
    args.batchsize, args.microbatch, args.logits_dtype, rows = 8, 8, "float32", []
    for shape in ("smollm2-135m",) if args.quick else ("smollm2-135m", "llama3.2-1b"):
        size = measures(described(shape), 2)
        for way, gradients in (("forward-only", False), ("straight_through, checkpointing, distillation", True)):
            said = sum(memory_bytes(size, args, gradients).values()) + size.learned  # m0, a byte a weight
            used = memory.measured_bytes(shape, way)
            rows.append({"model": shape, "learning": way, "predicted (MiB)": said / 2**20, "used (MiB)": used / 2**20,
                         "predicted / used": said / used})
    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="llama2-7b", help="a shape's name or a folder with a config.json")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", choices=list(DEVICES), default="h100")
    parser.add_argument("--batchsize", type=int, default=32, help="rows a minibatch")
    parser.add_argument("--microbatch", type=int, default=32, help="rows a forward pass")
    parser.add_argument("--sqlen", type=int, default=128, help="tokens a row")
    parser.add_argument("--m", type=int, default=4, help="M of N:M")
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--matmul", type=float, default=0.5, help="share of the data sheet's FLOP/s")
    parser.add_argument("--bandwidth", type=float, default=0.8, help="share of the data sheet's memory bandwidth")
    parser.add_argument("--host_bandwidth", type=float, default=100e9, help="bytes/s of the host's memory")
    parser.add_argument("--check", action="store_true", help="hold the memory against what is used on this CPU")
    args = parser.parse_args()
    if args.check:
        common.report(check(args), args, "8 rows of 128 tokens, bfloat16 weights, float32 logits, resident memory over "
                                         "that of the libraries")
    else:
        size = measures(described(args.model), 2)
        common.report(plan(size, DEVICES[args.gpu], args), args,
                      f"{args.model}: {size.weights / 1e9:.4g} G weights, {size.learned / 1e9:.4g} G of them learned, "
                      f"on {args.gpus} x {args.gpu}; {args.batchsize} x {args.sqlen} tokens a minibatch, "
                      f"{args.logits_dtype} logits; fits: under 92 % of the memory")


if __name__ == "__main__":
    run(main)
