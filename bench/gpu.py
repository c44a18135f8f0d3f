"""What this code does on a GPU: whether it is right there, how fast it is, how much memory it takes.

    python bench/gpu.py --json gpu.json               # all, about ten minutes on a card
    python bench/gpu.py --device cpu --quick          # the same measurements, small, without a card
    python bench/gpu.py --rows draws                  # only those whose names contain this

    agreement   compiled kernels on the device against eager ones there and on the CPU: one update, one vector-Jacobian
                product, soft weights. Masks apart: share of the blocks. ulp: units in the last place, at most.
    draws       the compiled step's draws against the exact probabilities of the patterns, by chi-square. Rare flips are
                the whole learning signal, so the tails must be right: N logits are at `gap`, the others at 0.
    profile     the kernels and copies that one layer's pass launches, counted by torch's profiler.
    kernels     time of each pass beside that of a copy of the bytes that it reads and writes.
    step        whole model, 2:4: a step from forward passes on 32 x 128 tokens, and one from gradients with
                checkpointing and distillation on 8 x 128.
    runs        whole runs of both scripts: the same seed twice, and once killed and resumed. The same mask?

Each row goes to --json at once, so a time limit loses nothing. After a failure the next measurement starts; the exit
code is then 1.
"""
import argparse
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import pge
from files.records import write_json
from masking.block_bits import mask_to_bits
from masking.kernels import Kernels
from masking.masked_model import MaskedModel
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace
from utils import DTYPES, environment, run_script

import torch
from scaling import make_inputs
from torch import Tensor

PATTERNS = [(1, 4), (2, 4), (2, 8), (4, 8)]
DRAWS = [(2, 4, 0), (2, 4, 10), (2, 4, 16), (1, 4, 10), (4, 8, 10)]  # N, M, gap
SCRIPTS = {
    "train.py": "--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl --dtype auto "
                "--seqlen 24 --batchsize 4 --dataset_size 12 --baseline online --lr 5 --logits 1 --max_step {steps} "
                "--skip_checkpoint",
    "sparsify.py": "--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl --dtype auto "
                   "--seqlen 24 --batchsize 4 --steps {steps} --skip_checkpoint"}
NOT_MEASURED, APART = "not measured", "NOT THE SAME"


# ---------------------------------------------------------------------------------------------------------------------
# one layer

class Layer:
    """Logits, bits, weight and gradient of one layer, the same on every device; a method for each kernel of a step."""

    def __init__(self, shape: tuple[int, int], n: int, m: int, weight_dtype: torch.dtype, logits_dtype: torch.dtype,
                 device: str, mode: str = "compiled"):
        generator = torch.Generator().manual_seed(0)
        blocks = shape[0] * shape[1] // m
        mask = pge.mode(torch.rand(blocks, m, generator=generator), n)
        noise = torch.randn(blocks, m, generator=generator)
        self.kernels = Kernels(LinearSpace(n, m), mode)
        self.logits = [(3 * mask[:, i] + noise[:, i]).to(device, logits_dtype) for i in range(m)]
        self.bits = mask_to_bits(mask).to(device)
        self.weight = torch.randn(shape, generator=generator).to(device, weight_dtype)
        self.gradient = torch.randn(shape, generator=generator).to(device, weight_dtype)
        self.out = torch.empty_like(self.weight).view(-1)
        self.key = torch.nn.functional.pad(layer_keys(0, 7, 1), (0, 2))[0].to(device)
        self.coefficient = torch.tensor(0.7, device=device)
        self.scale = torch.tensor([3.0, 0.05, 1.0, 0.95], device=device)
        self.mean_squares = torch.full((blocks,), -1.0, device=device)

    def update(self) -> None:
        self.kernels.update(self.logits, self.bits, self.weight.view(-1), self.out, self.coefficient, self.key)

    def vjp(self, mean_squares: Tensor | None = None) -> None:
        self.kernels.vjp(self.logits, self.bits, self.weight, self.gradient, mean_squares, self.scale, self.key)

    def vjp_by_block(self) -> None:
        self.vjp(self.mean_squares)

    def write_soft(self) -> None:
        self.kernels.write_soft(self.logits, self.weight.view(-1), self.out, self.coefficient)

    def passes(self) -> dict[str, Callable[[], None]]:
        """Each kernel of a step, by its name."""
        return {"update": self.update, "vjp": self.vjp, "vjp by block": self.vjp_by_block, "soft": self.write_soft}


def ulps_apart(a: Tensor, b: Tensor) -> float:
    """The most units in the last place that two tensors are apart."""
    a, b = a.cpu(), b.cpu()
    unit = torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).float().clamp(min=1.0)
    return float(((a.float() - b.float()).abs() / unit).max())


def agreement(args: argparse.Namespace) -> Iterator[dict]:
    shape = (256, 512) if args.quick else (2048, 5632)
    dtypes = [torch.float32] if args.quick else list(DTYPES.values())
    cases = [(*pattern, weight_dtype, logits_dtype) for pattern in (PATTERNS[1:2] if args.quick else PATTERNS)
             for weight_dtype in dtypes for logits_dtype in dtypes]
    for n, m, weight_dtype, logits_dtype in cases:
        layers, drawn = [], []
        for device, mode in ((args.device, "compiled"), (args.device, "eager"), ("cpu", "eager")):
            layer = Layer(shape, n, m, weight_dtype, logits_dtype, device, mode)
            layer.update()
            drawn.append(layer.bits.cpu().clone())
            layer.vjp()
            layer.write_soft()
            layers.append(layer)
        ours, *others = layers
        row = {"what": f"{n}:{m}, weights {weight_dtype}, logits {logits_dtype}".replace("torch.", "")}
        for name, other, bits in zip(("eager", "the CPU"), others, drawn[1:]):
            row |= {f"masks apart from {name}": float((drawn[0] != bits).float().mean()),
                    f"logits from {name} (ulp)": max(map(ulps_apart, ours.logits, other.logits)),
                    f"soft weights from {name} (ulp)": ulps_apart(ours.out, other.out)}
        yield row


def draws(args: argparse.Namespace) -> Iterator[dict]:
    count, blocks = (4 * 10**6, 2**20) if args.quick else (10**9, 2**22)
    for n, m, gap in DRAWS[1:2] if args.quick else DRAWS:
        one = torch.tensor([float(gap)] * n + [0.0] * (m - n)) + torch.linspace(0, 0.5, m)  # all patterns differ
        rounds = -(-count // blocks)
        seen = drawn_counts(one, n, blocks, rounds, args.seed, args.device)
        probs, table = pge.pattern_probs(one[None].double(), n)[0], pge.patterns(n, m)
        found, freedom, p = chi_square(seen[mask_to_bits(table).long()].double(), probs * blocks * rounds)
        yield {"what": f"{n}:{m}, gap {gap}", "draws": blocks * rounds,
               "left m0 (expected)": float((1 - probs.max()) * blocks * rounds),
               "left m0 (seen)": int(blocks * rounds - seen.max()), "chi-square": found, "freedom": freedom, "p": p}


def drawn_counts(one: Tensor, n: int, blocks: int, rounds: int, seed: int, device: str) -> Tensor:
    """How often each pattern is drawn, int64 `[2^M]` by the pattern's bits, on the CPU. Each round draws for so many
    blocks that all have the logits `one` `[M]`."""
    m = len(one)
    logits = [torch.full((blocks,), value, device=device) for value in one.tolist()]
    bits = mask_to_bits(pge.patterns(n, m)[:1]).expand(blocks).contiguous().to(device)
    weight = torch.ones(blocks * m, device=device, dtype=torch.bfloat16)
    out, nothing = torch.empty_like(weight), torch.zeros((), device=device)
    kernels, counts = Kernels(LinearSpace(n, m)), torch.zeros(2**m, dtype=torch.long, device=device)
    for t in range(rounds):
        kernels.update(logits, bits, weight, out, nothing, layer_keys(seed, t, 1)[0].to(device))
        counts += torch.bincount(bits.int(), minlength=2**m)
    return counts.cpu()


def chi_square(seen: Tensor, expected: Tensor) -> tuple[float, int, float]:
    """Chi-square of counts `[patterns]`, its degrees of freedom, and the probability of a larger one. Patterns with
    fewer than 5 expected counts are pooled."""
    kept = expected >= 5
    seen = torch.cat([seen[kept], seen[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None]])
    seen, expected = seen[expected >= 5], expected[expected >= 5]
    found, freedom = float(((seen - expected) ** 2 / expected).sum()), len(seen) - 1
    p = torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(found / 2).double())
    return found, freedom, float(p)


def profile(args: argparse.Namespace) -> Iterator[dict]:
    if not args.device.startswith("cuda"):
        yield {"what": "update and vjp", "kernels": NOT_MEASURED, "copies": NOT_MEASURED}
        return
    for n, m, dtype in [(2, 4, torch.bfloat16), (4, 8, torch.bfloat16), (2, 4, torch.float32)]:
        layer = Layer((1024, 1024), n, m, dtype, torch.float32, args.device)
        for name, run in layer.passes().items():
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                run()
                torch.cuda.synchronize()
            events = [event.name.lower() for event in found.events()]
            copies = sum("memcpy" in event or "memset" in event for event in events)
            yield {"what": f"{name}, {n}:{m}, {str(dtype).removeprefix('torch.')}", "kernels": len(events) - copies,
                   "copies": copies}


def kernels(args: argparse.Namespace) -> Iterator[dict]:
    shape, repeats = ((512, 512), 3) if args.quick else ((4096, 11008), 20)
    for n, m in PATTERNS[1:2] if args.quick else PATTERNS:
        layer = Layer(shape, n, m, torch.bfloat16, torch.float16, args.device)
        copies = [(tensor, tensor.clone()) for tensor in (*layer.logits, layer.bits, layer.weight)]
        copy_s = common.queued_s(lambda copies=copies: [a.copy_(b) for a, b in copies], args.device, repeats)
        for name, run in layer.passes().items():
            kernel_s = common.queued_s(run, args.device, repeats)
            yield {"what": f"{name}, {n}:{m}, {shape[0]} x {shape[1]}", "ms": 1e3 * kernel_s,
                   "of a copy": kernel_s / copy_s, "ns a weight": 1e9 * kernel_s / layer.weight.numel()}


# ---------------------------------------------------------------------------------------------------------------------
# a whole model, whole runs

def step(args: argparse.Namespace) -> Iterator[dict]:
    yield step_row(args, "forward-only", 32, torch.float16)
    yield step_row(args, "gradients", 8, torch.float32)


def step_row(args: argparse.Namespace, what: str, sequences: int, logits_dtype: torch.dtype) -> dict:
    """The row of a way to learn, on so many sequences of 128 tokens, a quarter of them with --quick."""
    gpu, device = args.device.startswith("cuda"), args.device
    if gpu:
        gc.collect()  # the model of the row before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    shape = "tiny" if args.quick else "llama2-7b" if gpu else "smollm2-135m"
    model = common.random_llama(shape, device, torch.float16 if gpu else torch.bfloat16, args.seed)
    batch = torch.randint(0, 256, (sequences // 4 if args.quick else sequences, 128), device=device)
    with torch.no_grad():
        forward_s = common.median_s(lambda: model(input_ids=batch, use_cache=False), device)
    masked = MaskedModel(model, common.magnitude_masks(model), LinearSpace(2, 4), logits_dtype=logits_dtype)
    learn = (common.forward_step(masked) if what == "forward-only" else
             common.gradient_step(masked, checkpointing=True, distill=1.0))
    compile_s = common.median_s(lambda: learn(batch), device, repeats=1, warm_up=0)
    step_s = common.median_s(lambda: learn(batch), device)
    return {"what": f"{what}, {shape}, {batch.numel()} tokens", "first step, compiling (s)": compile_s,
            "forward (s)": forward_s, "step (s)": step_s, "of a forward": step_s / forward_s,
            "allocated (GiB)": torch.cuda.max_memory_allocated() / 2**30 if gpu else NOT_MEASURED,
            "reserved (GiB)": torch.cuda.max_memory_reserved() / 2**30 if gpu else NOT_MEASURED}


def runs(args: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args.seed)
        for script, flags in list(SCRIPTS.items())[:1 if args.quick else None]:
            outs = [folder / f"{script}{number}" for number in range(3)]
            commands = [[script, *flags.format(folder=folder, steps=8 if args.quick else 30).split(), "--device",
                         args.device, "--out", str(out)] for out in outs]
            for command in commands[:2]:
                run(command)
            killed = kill(commands[2], outs[2])
            if killed:
                run([script, "--resume", str(outs[2])])
            once, again, resumed = (json.loads((out / "run.json").read_text())["summary"]["mask_fingerprint"]
                                    for out in outs)
            yield {"what": script, "the same seed twice": "same" if again == once else APART, "killed and resumed":
                   APART if resumed != once else "same" if killed else "it ended before it was killed"}


def run(command: list[str]) -> None:
    """Run a script. RuntimeError with the end of its messages if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])


def kill(command: list[str], out: Path) -> bool:
    """Start a run and kill it after its third step; False if it has ended before."""
    process = subprocess.Popen([sys.executable, *command, "--checkpoint_every", "1"], cwd=common.ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


MEASUREMENTS = {"agreement": agreement, "draws": draws, "profile": profile, "kernels": kernels, "step": step,
                "runs": runs}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", default="", help="only measurements whose names contain one of these, by commas")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    everything, failed, conditions = [], [], environment(args.device)

    def keep(name: str, row: dict) -> None:
        everything.append({"table": name, **row, **conditions})
        if args.json:
            write_json(args.json, everything)
        if APART in row.values() or "error" in row:
            failed.append(name)
    for name in common.chosen(MEASUREMENTS, args.rows):
        rows = []
        try:
            for row in MEASUREMENTS[name](args):
                rows.append(row)
                keep(name, row)
        except Exception as error:  # the other measurements are worth having all the same
            rows.append({"what": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
            keep(name, rows[-1])
        print(f"\n{name}")
        common.print_table(rows)
    print(f"failed: {', '.join(failed) or 'nothing'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    run_script(main)
