"""One textbook mask update against one plain forward, on the demo model's shape: the number that has to be beaten.

    python bench/reference_step.py [--quick] [--json FILE] [--device cuda]

The paper names mask sampling as its bottleneck. This times the plain formulation (bench/textbook.py: softmax, score,
torch.multinomial, multiply) over all 210 layers of SmolLM2-135M's shape, beside the forward of 32 x 128 tokens that it
serves.
"""
import common
import textbook
import torch

from layers import find_layers

args = common.parser(__doc__).parse_args()
dtype = common.fast_dtype(args.device)
model = common.random_llama("smollm2-135m", args.device, dtype, args.seed)
layers = list(find_layers(model).values())
tokens = torch.randint(0, 49152, (8 if args.quick else 32, 128), device=args.device)
repeats = 3 if args.quick else 5

with torch.no_grad():
    forward_s = common.median_s(lambda: model(input_ids=tokens, use_cache=False), args.device, repeats)
parts = {"update": 0.0, "resample": 0.0, "apply": 0.0}
shapes = [tuple(module.weight.shape) for module in layers]
for shape in sorted(set(shapes)):  # a layer of each shape is timed and counted as often as it occurs
    for part, seconds in textbook.layer_times(shape, dtype, args.device, repeats).items():
        parts[part] += shapes.count(shape) * seconds
rows = [{"what": f"forward, {tokens.numel()} tokens, {dtype}", "seconds": forward_s, "forwards": 1.0}]
rows += [{"what": f"textbook {part}", "seconds": s, "forwards": s / forward_s} for part, s in parts.items()]
total = sum(parts.values())
rows.append({"what": "textbook mask step in all", "seconds": total, "forwards": total / forward_s})
common.report(rows, args)
