"""Compares the fused mask step with the naive one, on one layer and in a whole model: is the mask
step cheap?

    python bench/step.py [--quick] [--json FILE] [--device cuda]
    python bench/step.py --shape llama2-7b --device cuda        # the paper's model, random weights

The paper names mask sampling as its bottleneck. One layer: update, resample and apply, naive and
fused, and a copy of the same bytes. The copy is a lower bound: every logit, mask integer and weight
is read and written once (bench/gpu.py has other patterns). Whole model: a forward pass of the
sparse model, a training step (the forward pass with the fused mask step inside), and the naive
step. Last, the steps of sparsify.py, which learn from gradients with distillation, on 8 x 128
tokens. There, forward pass and steps take turns, so that changes of the machine's speed affect all.
"""

import argparse
import statistics
from collections import Counter
from functools import partial

import common
from masking.block_bits import mask_to_bits
from masking.kernels import Kernels
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.machine import fast_dtype, reset_peak_memory
from training.straight_through import StraightThrough
from utils import run_script

import torch
from random_models import SHAPES, random_llama
from torch import Tensor

Shape = tuple[int, int]  # [out, in]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--shape", choices=list(SHAPES), default=None, help="shape of the whole model"
    )
    parser.add_argument(
        "--layer",
        type=int,
        nargs=2,
        help="shape of the one layer: out in (default: 2048 5632, or on a GPU 4096 11008, which "
        "exceeds its caches)",
    )
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# the naive mask step, for comparison: each formula in plain PyTorch operations, with logits and
# masks `[blocks, 4]`


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """Return d log p(mask) / d logits at 2:4, float32 `[blocks, 4]`, in closed form, without the
    1e-8 terms of the authors' code. mask: bool.

    u_i = [i in S] (1 + R p_i / q_i^2), q_i = sum_{j != i} p_j, R = 1 / (1/q_a + 1/q_b);  g = u - p
    sum(u).
    """
    probs = torch.softmax(logits, 1)
    others = probs.sum(1, keepdim=True) - probs
    ratio = 1 / (mask / others).sum(1, keepdim=True)
    u = mask * (1 + ratio * probs / others**2)
    return u - probs * u.sum(1, keepdim=True)


def update(logits: Tensor, mask: Tensor, coefficient: float) -> None:
    """Set pi <- pi - coefficient * score, in place."""
    logits -= coefficient * score(logits, mask)


def resample(logits: Tensor, mask: Tensor) -> None:
    """Draw mask ~ p(pi), in place."""
    kept = torch.multinomial(torch.softmax(logits, 1), 2)
    mask.zero_().scatter_(1, kept, True)


def naive_s(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> float:
    """Return the seconds of the naive step on one layer whose float32 logits start at C = 10."""
    weight = torch.randn(shape, device=device, dtype=dtype)
    masked = torch.empty_like(weight)
    logits = torch.tensor([10.0, 10, 0, 0], device=device).repeat(weight.numel() // 4, 1)
    mask = logits > 5
    parts = (
        lambda: update(logits, mask, 0.01),
        lambda: resample(logits, mask),
        lambda: torch.mul(weight, mask.view_as(weight), out=masked),
    )
    return sum(common.queued_s(part, device, repeats) for part in parts)


# --------------------------------------------------------------------------------------------------
# one layer


def fused_times(
    shape: Shape,
    n: int,
    m: int,
    weight_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device: str,
    repeats: int,
) -> tuple[float, float]:
    """Return the median seconds of the compiled step on one layer, and of a copy of the same
    bytes."""
    blocks = shape[0] * shape[1] // m
    weight = torch.randn(shape[0] * shape[1], device=device, dtype=weight_dtype)
    out = torch.empty_like(weight)
    logits = [
        torch.full((blocks,), 10.0 if i < n else 0.0, device=device, dtype=logits_dtype)
        for i in range(m)
    ]
    bits = mask_to_bits(torch.stack(logits, 1) > 5)
    copies = [(tensor, tensor.clone()) for tensor in (*logits, bits, weight)]
    coefficient = torch.tensor(0.01, device=device)
    keys = iter(layer_keys(0, 0, 1000).to(device))
    kernels = Kernels(LinearSpace(n, m))
    ours_s = common.queued_s(
        lambda: kernels.update(logits, bits, weight, out, coefficient, next(keys)), device, repeats
    )
    copy_s = common.queued_s(
        lambda: [target.copy_(source) for source, target in copies], device, repeats
    )
    return ours_s, copy_s


def layer_rows(
    shape: Shape, dtypes: list[tuple[torch.dtype, torch.dtype]], device: str, repeats: int
) -> list[dict]:
    """Return the table's rows of one layer, for each (weight dtype, logits dtype)."""
    rows = []
    for weight_dtype, logits_dtype in dtypes:
        ours_s, copy_s = fused_times(shape, 2, 4, weight_dtype, logits_dtype, device, repeats)
        layer_s = naive_s(shape, weight_dtype, device, repeats)
        rows.append(
            {
                "what": (
                    f"layer {shape[0]}x{shape[1]}, {weight_dtype} weights, {logits_dtype} logits"
                ),
                "naive (s)": layer_s,
                "ours (s)": ours_s,
                "naive/ours": layer_s / ours_s,
                "copy of the same bytes (s)": copy_s,
                "ours/copy": ours_s / copy_s,
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------
# a whole model


def model_rows(
    shape: str,
    depth: int | None,
    sequences: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
    repeats: int,
    later: int,
) -> list[dict]:
    """Return the table's rows of forward-only learning on `sequences` sequences of 128 tokens.
    depth: number of decoder layers, None for the shape's. The training step is timed again after
    `later` steps."""
    model = random_llama(shape, device, dtype, seed, depth)
    tokens = torch.randint(0, min(32000, model.config.vocab_size), (sequences, 128), device=device)
    masks = common.magnitude_masks(model)
    layers = find_layers(model)
    apply_masks(layers, masks)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens, use_cache=False)

    forward_s = common.median_s(forward, device, repeats)
    shapes = Counter(tuple(module.weight.shape) for module in layers.values())
    mask_step_s = sum(count * naive_s(shape, dtype, device, 3) for shape, count in shapes.items())
    common.free_memory(device)
    reset_peak_memory()
    masked = MaskedModel(model, masks, LinearSpace(2, 4), logits_dtype=torch.float16)

    def training_step() -> None:
        masked.update(0.01)
        forward()

    ours_s = common.median_s(training_step, device, repeats, warm_up=3)
    for _ in range(later):
        training_step()
    late_s = common.median_s(training_step, device, repeats)
    with masked.use_dense():
        # timed again, since the machine's speed may have changed
        forward_s = min(forward_s, common.median_s(forward, device, repeats))
    return [
        {
            "what": (
                f"{shape}{f' ({depth} layers)' if depth else ''}: forward of {tokens.numel()} "
                f"tokens, {dtype}"
            ),
            "ours (s)": forward_s,
        },
        {
            "what": "forward + naive step",
            "naive (s)": forward_s + mask_step_s,
            "of a forward": 1 + mask_step_s / forward_s,
        },
        {
            "what": "forward + our step, float16 logits",
            "ours (s)": ours_s,
            "of a forward": ours_s / forward_s,
        },
        {
            "what": f"the same, {later} steps later",
            "ours (s)": late_s,
            "of a forward": late_s / forward_s,
        },
    ]


def sparsify_rows(
    shape: str, depth: int | None, dtype: torch.dtype, device: str, seed: int, repeats: int
) -> list[dict]:
    """Return the rows of the steps of sparsify.py, with soft and with hard masks, and of a forward
    pass of the dense model; medians over turns."""
    dense, model = (random_llama(shape, device, dtype, seed, depth) for _ in range(2))
    tokens = torch.randint(0, min(32000, model.config.vocab_size), (8, 128), device=device)
    masked = MaskedModel(
        model, common.magnitude_masks(model), LinearSpace(2, 4), common.DEFAULTS["logits"]
    )
    learner = StraightThrough(masked)

    @torch.no_grad()
    def forward() -> None:
        dense(input_ids=tokens, use_cache=False)

    count = f"{tokens.numel()} tokens"
    timed = {f"forward of {count}": forward}
    for masks, temperature in (("soft", 1.0), ("hard", 0.0)):
        learn = common.gradient_step(learner, common.DEFAULTS["distill"], temperature)
        timed[f"step of sparsify.py, {count}, {masks} masks"] = partial(learn, tokens)
    for function in timed.values():
        common.median_s(function, device, 2, warm_up=0)
    turns = [
        [common.median_s(function, device, 1, warm_up=0) for function in timed.values()]
        for _ in range(repeats)
    ]
    medians = [statistics.median(times) for times in zip(*turns)]
    return [
        {"what": what, "ours (s)": seconds, "of a forward": seconds / medians[0]}
        for what, seconds in zip(timed, medians)
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    gpu = args.device.startswith("cuda")
    repeats = 3 if args.quick else 7
    dtype = fast_dtype(args.device)
    dtypes = list(
        dict.fromkeys([(torch.float32,) * 2, (dtype, torch.float32), (dtype, torch.float16)])
    )
    layer = args.layer or ((4096, 11008) if gpu else (2048, 5632))
    rows = layer_rows(layer, dtypes[:1] if args.quick else dtypes, args.device, repeats)
    shape = args.shape or ("llama2-7b" if gpu else "smollm2-135m")
    sequences, depth = (32, None) if gpu or not args.quick else (8, 6)
    rows += model_rows(
        shape, depth, sequences, dtype, args.device, args.seed, repeats, 0 if args.quick else 30
    )
    if gpu:
        rows.append(
            {
                "what": (
                    f"peak memory of training: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
                )
            }
        )
    common.free_memory(args.device)
    rows += sparsify_rows(shape, depth, dtype, args.device, args.seed, repeats)
    common.report(rows, args)


if __name__ == "__main__":
    run_script(main)
