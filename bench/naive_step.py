"""One naive mask update against one plain forward, on the demo model's shape: the number that has to be beaten.

    python bench/naive_step.py [--quick] [--json FILE] [--device cuda]

The paper names mask sampling as its bottleneck. This times the plain formulation (bench/naive_baseline.py: softmax,
score, torch.multinomial, multiply) over all 210 layers of SmolLM2-135M's shape, beside the forward of 32 x 128 tokens
that it serves.
"""
import argparse

import common
from utils import fast_dtype, run_script

import naive_baseline
import torch

from models.layers import find_layers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return common.parser(__doc__).parse_args(argv)


def measure(device: str, seed: int, sequences: int, repeats: int) -> list[dict]:
    """The table's rows: a forward of so many sequences of 128 tokens, and the parts of the naive step."""
    dtype = fast_dtype(device)
    model = common.random_llama("smollm2-135m", device, dtype, seed)
    tokens = torch.randint(0, 49152, (sequences, 128), device=device)
    with torch.no_grad():
        forward_s = common.median_s(lambda: model(input_ids=tokens, use_cache=False), device, repeats)
    shapes = [tuple(module.weight.shape) for module in find_layers(model).values()]
    parts = naive_baseline.model_times(shapes, dtype, device, repeats)
    times = {f"forward, {tokens.numel()} tokens, {dtype}": forward_s,
             **{f"naive {part}": seconds for part, seconds in parts.items()},
             "naive mask step in all": sum(parts.values())}
    return [{"what": what, "seconds": seconds, "forwards": seconds / forward_s} for what, seconds in times.items()]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    common.report(measure(args.device, args.seed, 8 if args.quick else 32, 3 if args.quick else 5), args)


if __name__ == "__main__":
    run_script(main)
