"""The fused mask step against the textbook one, on one layer and on a whole model, and how it grows.

    python bench/step.py [--quick] [--json FILE] [--device cuda]
    python bench/step.py --shape llama2-7b --device cuda        # the paper's model, random weights

One layer: update + resample + apply in both formulations, and a plain copy of the same bytes (every logit, mask integer
and weight read once and written once), the floor. Whole model: a plain forward of the sparse model, a training step
(forward with the fused mask step inside, and update), the textbook step. Growth: more weights, larger M, later steps.
"""
import common
import textbook
import torch

import layers
import masked_model
import pge
import step

parser = common.parser(__doc__)
parser.add_argument("--shape", choices=list(common.SHAPES), default=None, help="of the whole model")
parser.add_argument("--layer", type=int, nargs=2, default=(2048, 5632), help="shape of the one layer: out in")
args = parser.parse_args()
gpu = args.device.startswith("cuda")
repeats = 3 if args.quick else 7
dtype = common.fast_dtype(args.device)


def fused_times(shape, n, m, weight_dtype, logits_dtype):
    """Median seconds of the compiled step on one layer, and of a copy of the same bytes."""
    blocks = shape[0] * shape[1] // m
    weight = torch.randn(shape[0] * shape[1], device=args.device, dtype=weight_dtype)
    out = torch.empty_like(weight)
    logits = [torch.full((blocks,), 10.0 if i < n else 0.0, device=args.device, dtype=logits_dtype) for i in range(m)]
    bits = step.mask_to_bits(torch.stack(logits, 1) > 5)
    copies = [(tensor, tensor.clone()) for tensor in (*logits, bits, weight)]
    coefficient = torch.tensor(0.01, device=args.device)
    keys = iter(step.layer_keys(0, 0, 1000).to(args.device))
    run = step.step_function(pge.LinearSpace(n, m))
    ours_s = common.median_s(lambda: run(logits, bits, weight, out, coefficient, next(keys)), args.device, repeats)
    copy_s = common.median_s(lambda: [target.copy_(source) for source, target in copies], args.device, repeats)
    return ours_s, copy_s


rows = []
for weight_dtype, logits_dtype in [(torch.float32, torch.float32), (dtype, torch.float32), (dtype, torch.float16)]:
    if args.quick and rows:
        continue
    ours_s, copy_s = fused_times(args.layer, 2, 4, weight_dtype, logits_dtype)
    textbook_s = sum(textbook.layer_times(args.layer, weight_dtype, args.device, repeats).values())
    rows.append({"what": f"layer {args.layer[0]}x{args.layer[1]}, {weight_dtype} weights, {logits_dtype} logits",
                 "textbook (s)": textbook_s, "ours (s)": ours_s, "textbook/ours": textbook_s / ours_s,
                 "copy of the same bytes (s)": copy_s, "ours/copy": ours_s / copy_s})

if not args.quick:
    ours_per_weight = {}
    for what, shape, n, m in [("4x the weights", (2 * args.layer[0], 2 * args.layer[1]), 2, 4),
                              ("M = 4", args.layer, 2, 4), ("1:4", args.layer, 1, 4), ("2:8", args.layer, 2, 8),
                              ("M = 8 (4:8)", args.layer, 4, 8)]:
        ours_s, copy_s = fused_times(shape, n, m, dtype, torch.float16)
        rows.append({"what": f"growth: {what}, {n}:{m}, ns a weight", "ours (s)": ours_s,
                     "copy of the same bytes (s)": copy_s, "ours/copy": ours_s / copy_s,
                     "ns a weight": 1e9 * ours_s / (shape[0] * shape[1])})

shape = args.shape or ("llama2-7b" if gpu else "smollm2-135m")
rows_of_tokens, depth = (32, None) if gpu or not args.quick else (8, 6)
model = common.random_llama(shape, args.device, dtype, args.seed, depth)
tokens = torch.randint(0, 32000, (rows_of_tokens, 128), device=args.device)
masks = common.magnitude_masks(model, 2, 4)
found = layers.find_layers(model)
layers.apply_masks(found, masks)
with torch.no_grad():
    forward_s = common.median_s(lambda: model(input_ids=tokens, use_cache=False), args.device, repeats)
shapes = [tuple(module.weight.shape) for module in found.values()]
textbook_s = sum(shapes.count(one) * sum(textbook.layer_times(one, dtype, args.device, 3).values())
                 for one in sorted(set(shapes)))
if gpu:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
masked = masked_model.MaskedModel(model, masks, pge.LinearSpace(2, 4), logits_dtype=torch.float16)


@torch.no_grad()
def training_step():
    masked.update(0.01)
    model(input_ids=tokens, use_cache=False)


ours_s = common.median_s(training_step, args.device, repeats, warm_up=3)
late_s = ours_s
for _ in range(0 if args.quick else 30):
    training_step()
late_s = common.median_s(training_step, args.device, repeats)
with torch.no_grad():  # again, beside the steps: the machine may have changed its pace
    forward_s = min(forward_s, common.median_s(lambda: model(input_ids=tokens, use_cache=False), args.device, repeats))
rows += [{"what": f"{shape}{f' ({depth} layers)' if depth else ''}: forward of {tokens.numel()} tokens, {dtype}",
          "ours (s)": forward_s},
         {"what": "forward + textbook step", "textbook (s)": forward_s + textbook_s,
          "of a forward": 1 + textbook_s / forward_s},
         {"what": "training step, float16 logits", "ours (s)": ours_s, "of a forward": ours_s / forward_s},
         {"what": "the same, 30 steps later", "ours (s)": late_s, "of a forward": late_s / forward_s}]
if gpu:
    rows.append({"what": "peak memory of training (GiB)", "ours (s)": torch.cuda.max_memory_allocated() / 2**30})
else:
    rows.append({"what": "H100, llama2-7b", "ours (s)": "not measured"})
common.report(rows, args)
