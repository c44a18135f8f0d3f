"""Times dense and 2:4 inference on sparse tensor cores: when does a 2:4 mask save time, and how
much?

    python bench/sparse_inference.py [--quick] [--json FILE] [--backend cutlass]
    python bench/sparse_inference.py --shape smollm2-135m --dtypes bfloat16

It needs an NVIDIA GPU of the Ampere generation or newer. A Llama with random weights is pruned to
2:4 by magnitude and timed with its zeros. Then torch.sparse.to_sparse_semi_structured compresses
every weight but the head's, and it is timed again: one Linear of each shape, and the whole model on
one sequence of 1 to 4096 tokens (1: a step of decoding without a cache). Both outputs are equal up
to rounding; the last column is their largest difference, as a share of the largest output.

Calls from Python are queued one after the other. With few tokens, the dispatch of the sparse tensor
in Python may take longer than the product. torch pads the tokens to a multiple of 8. The cuSPARSELt
backend runs with its default algorithm, and again with the one that it finds fastest for each shape
and number of tokens. CUTLASS has no such search, and runs only on compute capability 8.x.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import common
from masking.layers import apply_masks
from models.layers import find_layers
from models.machine import DTYPES
from utils import UserError, positive_int, run_script

import torch
from random_models import SHAPES, random_llama
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

CALLS = 10  # queued before each wait for the GPU
Inputs = dict[tuple[str, int], Tensor]  # (function's name, tokens) -> its input


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="llama2-7b", help="shape of the model"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float16", "bfloat16"],
        default=["float16", "bfloat16"],
        help="dtypes of weights and inputs",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=positive_int,
        default=[1, 16, 64, 256, 1024, 4096],
        help="tokens per call",
    )
    parser.add_argument(
        "--backend",
        choices=["cusparselt", "cutlass"],
        default="cusparselt",
        help="backend of the 2:4 products",
    )
    return parser.parse_args(argv)


def sparse_parameter(weight: Tensor) -> nn.Parameter:
    """Return a 2:4 weight `[out, in]` compressed to half its values and 2 bits for each. out and in
    must be multiples of 64."""
    return nn.Parameter(to_sparse_semi_structured(weight.contiguous()), requires_grad=False)


@torch.inference_mode()
def check_support(device: str, dtypes: list[str], backend: str) -> None:
    """Raise UserError unless a small 2:4 Linear runs on the device."""
    needs = (
        "2:4 products need an NVIDIA GPU with sparse tensor cores (Ampere or newer) and torch "
        "built for CUDA"
    )
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise UserError(f"{needs}; --device {device} cannot be measured here")
    for dtype in dtypes:
        try:
            weight = torch.tensor([1.0, 1, 0, 0], device=device, dtype=DTYPES[dtype]).repeat(64, 16)
            nn.functional.linear(weight[:1], sparse_parameter(weight))
        except (RuntimeError, NotImplementedError) as error:
            other = "cutlass" if backend == "cusparselt" else "cusparselt"
            raise UserError(
                f"{needs}; {backend} fails here in {dtype} ({str(error).splitlines()[0]}); try "
                f"--backend {other}"
            )


def callables(
    model: nn.Module, name: str, tokens: list[int], device: str
) -> tuple[dict[str, Callable], Inputs]:
    """Return the functions to time and their inputs: the first Linear of each shape with
    `[tokens, in]`, and the whole model, named `name`, with int64 `[1, tokens]`."""
    functions = {}
    inputs = {}
    for module in find_layers(model).values():
        what = f"Linear {module.out_features}x{module.in_features}"
        if what not in functions:
            functions[what] = module
            for count in tokens:
                inputs[what, count] = torch.randn(
                    count, module.in_features, device=device, dtype=model.dtype
                )
    functions[name] = lambda ids: model(input_ids=ids, use_cache=False).logits
    for count in tokens:
        inputs[name, count] = torch.randint(
            0, min(32000, model.config.vocab_size), (1, count), device=device
        )
    return functions, inputs


def measure(
    functions: dict[str, Callable], inputs: Inputs, device: str, repeats: int
) -> dict[tuple[str, int], tuple[float, Tensor]]:
    """Return (function's name, tokens) -> (median seconds of a call, its output)."""

    def calls(function: Callable, given: Tensor) -> None:
        for _ in range(CALLS):
            function(given)

    return {
        (what, tokens): (
            common.median_s(partial(calls, functions[what], given), device, repeats) / CALLS,
            functions[what](given),
        )
        for (what, tokens), given in inputs.items()
    }


def use_fastest_algorithms(layers: dict[str, nn.Module], tokens: int) -> None:
    """Have each 2:4 layer use the algorithm of cuSPARSELt that is fastest for `[tokens, in]`."""
    algorithms = {}
    padded = 8 * math.ceil(tokens / 8)  # as torch pads
    for module in layers.values():
        weight = module.weight
        if weight.shape not in algorithms:
            x = torch.randn(padded, weight.shape[1], device=weight.device, dtype=weight.dtype)
            algorithms[weight.shape] = torch._cslt_sparse_mm_search(
                weight.packed, x.T, transpose_result=True
            )
        weight.alg_id_cusparselt = algorithms[weight.shape]


def fastest(times_s: dict[str, float | None]) -> str:
    """Return the name of the shortest time; None is a time that was not measured."""
    measured = {name: time_s for name, time_s in times_s.items() if time_s is not None}
    return min(measured, key=measured.get)


@torch.inference_mode()
def compare(
    shape: str,
    dtype: torch.dtype,
    tokens: list[int],
    device: str,
    seed: int,
    depth: int | None,
    repeats: int,
    searches: bool,
) -> list[dict]:
    """Return the table's rows of one dtype. depth: number of decoder layers, None for the shape's;
    searches: whether the fastest algorithm is looked for, too."""
    common.free_memory(device)  # frees the model of the dtype before
    model = random_llama(shape, device, dtype, seed, depth)
    layers = find_layers(model)
    apply_masks(layers, common.magnitude_masks(model))
    functions, inputs = callables(
        model, f"{shape}, {model.config.num_hidden_layers} layers", tokens, device
    )
    dense = measure(functions, inputs, device, repeats)
    for module in layers.values():
        module.weight = sparse_parameter(module.weight.data)
    sparse = measure(functions, inputs, device, repeats)
    searched = {}
    for count in tokens if searches else []:
        use_fastest_algorithms(layers, count)
        of_count = {key: given for key, given in inputs.items() if key[1] == count}
        searched |= measure(functions, of_count, device, repeats)
    rows = []
    for (what, count), (dense_s, expected) in dense.items():
        sparse_s, output = sparse[what, count]
        searched_s = searched[what, count][0] if searches else None
        difference = (output.float() - expected.float()).abs().max() / expected.float().abs().max()
        rows.append(
            {
                "what": what,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": count,
                "dense (ms)": 1000 * dense_s,
                "2:4 (ms)": 1000 * sparse_s,
                "2:4, algorithm searched (ms)": 1000 * searched_s if searches else "",
                "fastest": fastest({"dense": dense_s, "2:4": sparse_s, "searched": searched_s}),
                "dense / 2:4": dense_s / min(sparse_s, searched_s or sparse_s),
                "max difference / max output": float(difference),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    dtypes, tokens = (args.dtypes[:1], [1, 64, 1024]) if args.quick else (args.dtypes, args.tokens)
    depth, repeats = (2, 3) if args.quick else (None, 7)
    SparseSemiStructuredTensor._FORCE_CUTLASS = args.backend == "cutlass"
    check_support(args.device, dtypes, args.backend)
    rows = [
        row
        for dtype in dtypes
        for row in compare(
            args.shape,
            DTYPES[dtype],
            tokens,
            args.device,
            args.seed,
            depth,
            repeats,
            searches=args.backend == "cusparselt",
        )
    ]
    common.report(
        rows,
        args,
        f"2:4 by {args.backend}; a row of the model is one sequence of tokens, without a cache",
    )


if __name__ == "__main__":
    run_script(main)
