"""Dense against 2:4 inference on sparse tensor cores: where, and by how much, a learned mask saves time.

    python bench/sparse_inference.py [--quick] [--json FILE] [--backend cutlass]
    python bench/sparse_inference.py --shape smollm2-135m --dtypes bfloat16

Needs an NVIDIA GPU of the Ampere generation or newer. A Llama of a named shape with random weights is made 2:4 by
magnitude and timed as it is, zeros and all; then every weight but the head's becomes what
torch.sparse.to_sparse_semi_structured makes of it, and it is timed again: a Linear of each shape alone, and the whole
model on one row of 1 to 4096 tokens (1: a step of decoding, without its cache). Both give the same outputs but for
rounding; the last column is how far they differ, of the largest output.

Times are of calls from Python, queued one after the other. With few tokens the sparse tensor's dispatch in Python may
take longer than the product itself. torch pads the tokens to a multiple of 8. The cuSPARSELt backend runs with its
default algorithm, not searched for each shape; CUTLASS runs on compute capability 8.x only.
"""
import common
import torch
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

import layers
from utils import DTYPES, UserError, positive_int, run

CALLS = 10  # queued before the GPU is waited for


def sparse_parameter(weight: torch.Tensor) -> torch.nn.Parameter:
    """A 2:4 weight `[out, in]` compressed to half its values and 2 bits for each; out and in multiples of 64."""
    return torch.nn.Parameter(to_sparse_semi_structured(weight.contiguous()), requires_grad=False)


@torch.inference_mode()
def check_support(args) -> None:
    """UserError unless a small 2:4 Linear runs on the device."""
    needs = "2:4 products need an NVIDIA GPU with sparse tensor cores (Ampere or newer) and torch built for CUDA"
    if not args.device.startswith("cuda") or not torch.cuda.is_available():
        raise UserError(f"{needs}; --device {args.device} cannot be measured here")
    for dtype in args.dtypes:
        try:
            weight = torch.tensor([1.0, 1, 0, 0], device=args.device, dtype=DTYPES[dtype]).repeat(64, 16)
            torch.nn.functional.linear(weight[:1], sparse_parameter(weight))
        except (RuntimeError, NotImplementedError) as error:
            other = "cutlass" if args.backend == "cusparselt" else "cusparselt"
            raise UserError(f"{needs}; {args.backend} fails here in {dtype} ({str(error).splitlines()[0]}); try "
                            f"--backend {other}")


def measure(function, given: torch.Tensor, device: str, repeats: int) -> tuple[float, torch.Tensor]:
    """Median seconds of a call, and its output."""
    def calls():
        for _ in range(CALLS):
            function(given)
    return common.median_s(calls, device, repeats) / CALLS, function(given)


@torch.inference_mode()
def compare(args, dtype: torch.dtype) -> list[dict]:
    """The rows of one dtype."""
    model = common.random_llama(args.shape, args.device, dtype, args.seed, 2 if args.quick else None)
    found = layers.find_layers(model)
    layers.apply_masks(found, common.magnitude_masks(model, 2, 4))
    functions, inputs = {}, {}
    for module in found.values():
        what = f"Linear {module.out_features}x{module.in_features}"
        if what not in functions:  # the first layer of each shape
            functions[what] = module
            for tokens in args.tokens:
                inputs[what, tokens] = torch.randn(tokens, module.in_features, device=args.device, dtype=dtype)
    whole = f"{args.shape}, {model.config.num_hidden_layers} layers"
    functions[whole] = lambda ids: model(input_ids=ids, use_cache=False).logits
    for tokens in args.tokens:
        inputs[whole, tokens] = torch.randint(0, 32000, (1, tokens), device=args.device)

    def measured():
        return {(what, tokens): measure(functions[what], given, args.device, 3 if args.quick else 7)
                for (what, tokens), given in inputs.items()}
    dense = measured()
    for module in found.values():
        module.weight = sparse_parameter(module.weight.data)
    sparse = measured()
    rows = []
    for (what, tokens), (dense_s, expected) in dense.items():
        sparse_s, output = sparse[what, tokens]
        difference = (output.float() - expected.float()).abs().max() / expected.float().abs().max()
        rows.append({"what": what, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens,
                     "dense (ms)": 1000 * dense_s, "2:4 (ms)": 1000 * sparse_s, "dense / 2:4": dense_s / sparse_s,
                     "max difference / max output": float(difference)})
    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=list(common.SHAPES), default="llama2-7b", help="of the model")
    parser.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16"], default=["float16", "bfloat16"],
                        help="of weights and inputs")
    parser.add_argument("--tokens", nargs="+", type=positive_int, default=[1, 16, 64, 256, 1024, 4096],
                        help="in a call")
    parser.add_argument("--backend", choices=["cusparselt", "cutlass"], default="cusparselt",
                        help="of the 2:4 products")
    args = parser.parse_args()
    if args.quick:
        args.dtypes, args.tokens = args.dtypes[:1], [1, 64, 1024]
    SparseSemiStructuredTensor._FORCE_CUTLASS = args.backend == "cutlass"
    check_support(args)
    rows = [row for dtype in args.dtypes for row in compare(args, DTYPES[dtype])]
    common.report(rows, args, f"2:4 by {args.backend}; a row of the model is one row of tokens, without a cache")


if __name__ == "__main__":
    run(main)
