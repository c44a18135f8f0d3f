"""The fused mask step against the naive one, on one layer and on a whole model, and how it grows.

    python bench/step.py [--quick] [--json FILE] [--device cuda]
    python bench/step.py --shape llama2-7b --device cuda        # the paper's model, random weights

One layer: update + resample + apply in both formulations, and a plain copy of the same bytes (every logit, mask integer
and weight read once and written once), the floor. Whole model: a plain forward of the sparse model, a training step
(forward with the fused mask step inside, and update), the naive step. Growth: more weights, larger M, later steps.
The step of `train.py --preset fast` on 8 x 128 tokens, with distillation: what it takes of a forward of as many, and
its parts; there forward and step take turns, so that a machine whose pace changes slows down both.
"""
import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import common
from utils import fast_dtype, run_script

import naive_baseline
import torch

from masking.block_bits import mask_to_bits
from masking.kernels import Kernels
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace
from models.layers import find_layers
from training import straight_through
from training.args import PRESETS

Shape = tuple[int, int]  # [out, in]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=list(common.SHAPES), default=None, help="of the whole model")
    parser.add_argument("--layer", type=int, nargs=2, default=(2048, 5632), help="shape of the one layer: out in")
    return parser.parse_args(argv)


def fused_times(shape: Shape, n: int, m: int, weight_dtype: torch.dtype, logits_dtype: torch.dtype, device: str,
                repeats: int) -> tuple[float, float]:
    """Median seconds of the compiled step on one layer, and of a copy of the same bytes."""
    blocks = shape[0] * shape[1] // m
    weight = torch.randn(shape[0] * shape[1], device=device, dtype=weight_dtype)
    out = torch.empty_like(weight)
    logits = [torch.full((blocks,), 10.0 if i < n else 0.0, device=device, dtype=logits_dtype) for i in range(m)]
    bits = mask_to_bits(torch.stack(logits, 1) > 5)
    copies = [(tensor, tensor.clone()) for tensor in (*logits, bits, weight)]
    coefficient = torch.tensor(0.01, device=device)
    keys = iter(layer_keys(0, 0, 1000).to(device))
    kernels = Kernels(LinearSpace(n, m))
    ours_s = common.queued_s(lambda: kernels.update(logits, bits, weight, out, coefficient, next(keys)), device,
                             repeats)
    copy_s = common.queued_s(lambda: [target.copy_(source) for source, target in copies], device, repeats)
    return ours_s, copy_s


def layer_rows(shape: Shape, dtypes: list[tuple[torch.dtype, torch.dtype]], device: str, repeats: int) -> list[dict]:
    """The table's rows of one layer, for each (dtype of the weights, of the logits)."""
    rows = []
    for weight_dtype, logits_dtype in dtypes:
        ours_s, copy_s = fused_times(shape, 2, 4, weight_dtype, logits_dtype, device, repeats)
        naive_s = sum(naive_baseline.layer_times(shape, weight_dtype, device, repeats).values())
        rows.append({"what": f"layer {shape[0]}x{shape[1]}, {weight_dtype} weights, {logits_dtype} logits",
                     "naive (s)": naive_s, "ours (s)": ours_s, "naive/ours": naive_s / ours_s,
                     "copy of the same bytes (s)": copy_s, "ours/copy": ours_s / copy_s})
    return rows


def growth_rows(layer: Shape, dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    """The table's rows of larger layers and other patterns, float16 logits."""
    rows = []
    for what, shape, n, m in [("4x the weights", (2 * layer[0], 2 * layer[1]), 2, 4), ("M = 4", layer, 2, 4),
                              ("1:4", layer, 1, 4), ("2:8", layer, 2, 8), ("M = 8 (4:8)", layer, 4, 8)]:
        ours_s, copy_s = fused_times(shape, n, m, dtype, torch.float16, device, repeats)
        rows.append({"what": f"growth: {what}, {n}:{m}, ns a weight", "ours (s)": ours_s,
                     "copy of the same bytes (s)": copy_s, "ours/copy": ours_s / copy_s,
                     "ns a weight": 1e9 * ours_s / (shape[0] * shape[1])})
    return rows


def model_rows(shape: str, depth: int | None, sequences: int, dtype: torch.dtype, device: str, seed: int, repeats: int,
               later: int) -> list[dict]:
    """The table's rows of a whole model of `depth` decoder layers (None: the shape's), on so many sequences of 128
    tokens; the training step is timed again `later` steps on."""
    model = common.random_llama(shape, device, dtype, seed, depth)
    tokens = torch.randint(0, min(32000, model.config.vocab_size), (sequences, 128), device=device)
    masks, layers = common.magnitude_masks(model, 2, 4), find_layers(model)
    apply_masks(layers, masks)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens, use_cache=False)
    forward_s = common.median_s(forward, device, repeats)
    shapes = [tuple(module.weight.shape) for module in layers.values()]
    naive_s = sum(naive_baseline.model_times(shapes, dtype, device, 3).values())
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    masked = MaskedModel(model, masks, LinearSpace(2, 4), logits_dtype=torch.float16)

    def training_step() -> None:
        masked.update(0.01)
        forward()
    ours_s = common.median_s(training_step, device, repeats, warm_up=3)
    for _ in range(later):
        training_step()
    late_s = common.median_s(training_step, device, repeats)
    forward_s = min(forward_s, common.median_s(forward, device, repeats))  # the machine may have changed its pace
    return [{"what": f"{shape}{f' ({depth} layers)' if depth else ''}: forward of {tokens.numel()} tokens, {dtype}",
             "ours (s)": forward_s},
            {"what": "forward + naive step", "naive (s)": forward_s + naive_s, "of a forward": 1 + naive_s / forward_s},
            {"what": "training step, float16 logits", "ours (s)": ours_s, "of a forward": ours_s / forward_s},
            {"what": f"the same, {later} steps later", "ours (s)": late_s, "of a forward": late_s / forward_s}]


def preset_rows(shape: str, depth: int | None, dtype: torch.dtype, device: str, seed: int, repeats: int) -> list[dict]:
    """The table's rows of the preset's step and its parts, medians of steps; the rest is the backward of what is not
    learned: attention, norms, the head, and the gradients of the learned layers' inputs."""
    model = common.random_llama(shape, device, dtype, seed, depth)
    as_it_comes = copy.deepcopy(model)
    tokens = torch.randint(0, min(32000, model.config.vocab_size), (8, 128), device=device)
    masked = MaskedModel(model, common.magnitude_masks(model, 2, 4), LinearSpace(2, 4), PRESETS["fast"]["logits"])
    learner = straight_through.StraightThrough(masked, distill=PRESETS["fast"]["distill"])
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    parts: dict[str, list[float]] = {}

    def timed(function: Callable, part: Callable[[], str]) -> Callable:
        """The function, whose seconds are added to the last number of a part."""
        def run(*arguments: object, **named: object) -> object:
            name = part()
            wait()
            start = time.perf_counter()
            found = function(*arguments, **named)
            wait()
            parts[name][-1] += time.perf_counter() - start
            return found
        return run

    def step() -> None:
        for seconds in parts.values():
            seconds.append(0.0)
        learner.learn(tokens, 0.01)

    @torch.no_grad()
    def forward() -> None:
        as_it_comes(input_ids=tokens, use_cache=False)
    step(), step(), forward()
    whole, plain = [], []
    for _ in range(repeats):
        plain.append(common.median_s(forward, device, 1, warm_up=0))
        whole.append(common.median_s(step, device, 1, warm_up=0))
    names = ["the teacher's forward", "the forward, masked weights written in it", "loss and its gradient",
             "gradients of the learned weights", "masked weights written again", "logits moved"]
    in_forward = "(of the forward: masked weights written)"
    parts.update({name: [] for name in (*names, in_forward)})
    model.forward = timed(model.forward, lambda: names[torch.is_grad_enabled()])
    masked.kernels.vjp = timed(masked.kernels.vjp, lambda: names[5])
    masked.write = timed(masked.write, lambda: in_forward if torch.is_grad_enabled() else names[4])
    with (patch.object(straight_through, "summed_loss", timed(straight_through.summed_loss, lambda: names[2])),
          patch.object(straight_through, "weight_gradient", timed(straight_through.weight_gradient, lambda: names[3]))):
        timed_s = [common.median_s(step, device, 1, warm_up=0) for _ in range(repeats)]
    forward_s, pace = statistics.median(plain), statistics.median(whole) / statistics.median(timed_s)
    found = {name: statistics.median(seconds) * pace for name, seconds in parts.items()}
    found["the rest: backward"] = statistics.median(whole) - sum(found[name] for name in names)
    title = f"the preset's step, {shape}{f' ({depth} layers)' if depth else ''}, {tokens.numel()} tokens"
    return [{"what": what, "ours (s)": seconds, "of a forward": seconds / forward_s}
            for what, seconds in [("a forward of as many", forward_s), (title, statistics.median(whole)),
                                  *((f"of it: {name}", seconds) for name, seconds in found.items())]]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    gpu, repeats, dtype = args.device.startswith("cuda"), 3 if args.quick else 7, fast_dtype(args.device)
    dtypes = [(torch.float32, torch.float32), (dtype, torch.float32), (dtype, torch.float16)]
    rows = layer_rows(args.layer, dtypes[:1] if args.quick else dtypes, args.device, repeats)
    if not args.quick:
        rows += growth_rows(args.layer, dtype, args.device, repeats)
    shape = args.shape or ("llama2-7b" if gpu else "smollm2-135m")
    sequences, depth = (32, None) if gpu or not args.quick else (8, 6)
    rows += model_rows(shape, depth, sequences, dtype, args.device, args.seed, repeats, 0 if args.quick else 30)
    if gpu:
        rows.append({"what": "peak memory of training (GiB)", "ours (s)": torch.cuda.max_memory_allocated() / 2**30})
    else:
        rows.append({"what": "H100, llama2-7b", "ours (s)": "not measured"})
    gc.collect()  # a model goes with its cycles
    rows += preset_rows(shape, depth, dtype, args.device, args.seed, repeats)
    common.report(rows, args)


if __name__ == "__main__":
    run_script(main)
