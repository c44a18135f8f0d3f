"""What this code does on a GPU: whether it is right there, how fast it is, how much memory it takes.

    python bench/gpu.py --json gpu.json               # all
    python bench/gpu.py --device cpu --quick          # the same measurements, small, without a card
    python bench/gpu.py --rows draws --budget_s 300   # only those whose names contain this, in five minutes

    step        whole model, 2:4: a step from forward passes on 32 x 128 tokens, and steps from gradients with
                checkpointing and distillation on 8 x 128 and 32 x 128.
    learning    a few steps of a small model, with all that sparsify.py can add, compiled on the device, against eager
                ones on the CPU in float32.
    profile     the kernels and copies that one layer's pass launches, counted by torch's profiler.
    runs        whole runs of both scripts: the same seed twice, and once killed and resumed. The same mask? (On a GPU
                this is judged of train.py alone: backward passes may round otherwise.)
    processes   two processes, on two GPUs: copies and --shard against one process (bench/scaling.py), and one of two
                killed: the run ends, and goes on to the same mask. Needs two GPUs, or --device cpu.
    agreement   compiled kernels on the device against eager ones there and on the CPU. Share: of the blocks. ulp: units
                in the last place, at most. Weights must be the same to the bit in blocks whose masks are.
    draws       the compiled step's draws against the exact probabilities of the patterns, by chi-square. Rare flips are
                the whole learning signal, so the tails must be right: N logits are at `gap`, the others at 0.
    kernels     time of each pass beside that of a copy of the bytes that it reads and writes.

A row that has limits has a verdict: what is out of them (step: on a GPU, without --quick). Tables go to --json at once,
so a time limit loses little. After a failure the next measurement starts; the exit code is then 1.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from files.records import write_json
from masking import compiler
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.machine import reset_peak_memory
from training.straight_through import StraightThrough
from utils import run_script

import torch
from gpu_layer import NOT_MEASURED, Rows, agreement, draws, kernels, profile
from scaling import WAYS, compare, make_inputs

PATIENCE_S = 300  # for three small steps, the start and compiling included
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SCRIPTS = {
    "train.py": "--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl --dtype auto "
                "--seqlen 24 --batchsize 4 --dataset_size 12 --baseline online --lr 5 --logits 1 --max_step {steps} "
                "--skip_checkpoint",
    "sparsify.py": "--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl --dtype auto "
                   "--seqlen 24 --batchsize 4 --steps {steps} --skip_checkpoint"}
CASES = [("forward passes", torch.float32, None), ("gradients", torch.float32, {}),
         ("gradients, checkpointing", torch.float32, {"checkpointing": True}),
         ("gradients", torch.bfloat16, {}), ("gradients", torch.float16, {})]


# ---------------------------------------------------------------------------------------------------------------------
# a whole model, whole runs

def step(args: argparse.Namespace) -> Rows:
    """A step from forward passes, and one from gradients with checkpointing and distillation."""
    yield step_row(args, "forward-only", 32, torch.float16), {
        "of a forward": (1, 1.4), "step (s)": (0, 0.2), "allocated (GiB)": (0, 30)}
    for sequences, most in ((8, 8), (32, 6)):
        yield step_row(args, "gradients", sequences, torch.float32), {"of a forward": (1, most)}


def step_row(args: argparse.Namespace, what: str, sequences: int, logits_dtype: torch.dtype) -> dict:
    """The row of a way to learn, on so many sequences of 128 tokens, a quarter of them with --quick."""
    gpu, device = args.device.startswith("cuda"), args.device
    common.free_memory(device)  # of the model of the row before
    reset_peak_memory()
    shape = "tiny" if args.quick else "llama2-7b" if gpu else "smollm2-135m"
    dtype = torch.float16 if gpu and what == "forward-only" else torch.bfloat16
    model = common.random_llama(shape, device, dtype, args.seed)
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


def learning(args: argparse.Namespace) -> Rows:
    """A few steps of a small model, compiled on the device, against eager ones on the CPU in float32."""
    batches = torch.randint(0, 256, (4, 8, 64), generator=torch.Generator().manual_seed(args.seed))
    for name, dtype, flags in CASES[:2] if args.quick else CASES:
        found = []
        for device, weights, backend in ((args.device, dtype, "compiled"), ("cpu", torch.float32, "eager")):
            model = common.random_llama("tiny", "cpu", torch.float32, args.seed).to(dtype).to(device, weights)
            masked = MaskedModel(model, common.magnitude_masks(model), LinearSpace(2, 4), 1.0, backend=backend)
            if flags is None:
                losses = [common.forward_step(masked)(batch) for batch in batches]
            else:
                learner = StraightThrough(masked, **flags)
                losses = [learner.step(batch, 0.3, [1.0] * 8).loss for batch in batches]
            masked.flush()
            found.append((losses, torch.cat([bits.cpu() for bits in masked.bits().values()])))
        (ours, mask), (expected, other) = found
        is_exact = dtype == torch.float32
        yield {"what": f"{name}, {dtype}".replace("torch.", ""), "masks apart from the CPU (share)": float(
            (mask != other).float().mean()), "losses apart (nats)": max(abs(a - b) for a, b in zip(ours, expected))}, {
            "masks apart from the CPU (share)": (0, 0.002 if is_exact else 0.1),
            "losses apart (nats)": (0, 1e-4 if is_exact else 0.05)}


def runs(args: argparse.Namespace) -> Rows:
    """Whole runs of both scripts: the same seed twice, and once killed and resumed. The same mask?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args.seed)
        for script, flags in list(SCRIPTS.items())[:1 if args.quick else None]:
            outs = [folder / f"{script}{number}" for number in range(3)]
            commands = [[script, *filled(flags, folder, 8 if args.quick else 30), "--device",
                         args.device, "--out", str(out)] for out in outs]
            for command in commands[:2]:
                run(command)
            killed = kill(commands[2], outs[2])
            if killed:
                run([script, "--resume", str(outs[2])])
            once, again, resumed = (json.loads((out / "run.json").read_text())["summary"]["mask_fingerprint"]
                                    for out in outs)
            yield {"what": script, "the same seed twice": int(again == once), "killed": int(killed),
                   "resumed, the same": int(resumed == once)}, {
                "killed": (1, 1), **same_bits(args, script, "the same seed twice", "resumed, the same")}


def processes(args: argparse.Namespace) -> Rows:
    """Two processes against one, and one of two killed."""
    if args.device.startswith("cuda") and torch.cuda.device_count() < 2:
        yield {"what": "two GPUs", "the same mask": NOT_MEASURED}, {}
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.seed)
        for way in WAYS:
            for row in compare(Path(folder), way, (2,), 4, args.device):
                yield {"what": row.pop("learning"), **row}, {"logits apart from one process's, at most": (0, 2e-3),
                                                             **same_bits(args, way, "the same mask")}
        for script, flags in SCRIPTS.items():
            outs = [Path(folder, script, name) for name in ("once", "killed")]
            place = ["--device", "cpu"] if args.device == "cpu" else []
            once, killed = ([*TWO, script, *filled(flags, folder, 8), "--shard", "--dtype",
                             "float32", *place, "--out", str(out)] for out in outs)
            run(once)
            is_killed = kill(killed, outs[1], rank=1)
            run([*TWO, script, "--resume", str(outs[1])])
            first, second = (json.loads((out / "run.json").read_text())["summary"]["mask_fingerprint"] for out in outs)
            yield {"what": f"{script} --shard", "one killed": int(is_killed), "the same mask": int(first == second)}, {
                "one killed": (1, 1), **same_bits(args, script, "the same mask")}


def same_bits(args: argparse.Namespace, what: str, *columns: str) -> dict:
    """The limits of columns that say whether masks are the same: none where a GPU's backward passes, which may round
    otherwise, have made them."""
    is_exact = args.device == "cpu" or what not in ("sparsify.py", "gradients")
    return dict.fromkeys(columns, (1, 1)) if is_exact else {}


def filled(flags: str, folder: str | Path, steps: int) -> list[str]:
    """The flags of a script of SCRIPTS, one by one: the folder's path may have spaces."""
    return [flag.format(folder=folder, steps=steps) for flag in flags.split()]


def run(command: list[str]) -> None:
    """Run a script. RuntimeError with the end of its messages if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])


def kill(command: list[str], out: Path, rank: int | None = None) -> bool:
    """Start a run and kill it, or this one of its launcher's processes, after its third step; False if it has ended
    before."""
    process = subprocess.Popen([sys.executable, *command, "--checkpoint_every", "1"], cwd=common.ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, began = out / "metrics.jsonl", time.monotonic()
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        if time.monotonic() - began > PATIENCE_S:
            process.kill()
            raise RuntimeError(f"{command} has not made three steps in {PATIENCE_S} s")
        time.sleep(0.02)
    if rank is None:
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    if process.poll() is None:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[rank]), signal.SIGKILL)
    return process.wait() != 0  # the launcher's code


MEASUREMENTS = {"step": step, "learning": learning, "profile": profile, "runs": runs, "processes": processes,
                "agreement": agreement, "draws": draws, "kernels": kernels}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", default="", help="only measurements whose names contain one of these, by commas")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="begin no row after so many seconds")
    return parser.parse_args(argv)


def verdict(row: dict, limits: dict) -> str:
    """What of a row is out of its limits, column -> (lowest, highest)."""
    wrong = [f"{column} is {row[column]:.4g}, not {low:g} to {high:g}" for column, (low, high) in limits.items()
             if row[column] != NOT_MEASURED and not low <= row[column] <= high]
    return "WRONG: " + "; ".join(wrong) if wrong else "right" if limits else ""


def main(argv: list[str] | None = None) -> None:
    args, began = parse_args(argv), time.monotonic()
    everything, failed, conditions = [], [], common.conditions_of(args)
    is_slow = not args.device.startswith("cuda")  # the limits of time and memory are a card's
    for name in common.chosen(MEASUREMENTS, args.rows):
        rows, measured = [], MEASUREMENTS[name](args)
        try:
            while (is_early := time.monotonic() - began <= args.budget_s) and (found := next(measured, None)):
                row, limits = found
                is_judged = name != "step" or not (is_slow or args.quick)
                rows.append({**row, "verdict": verdict(row, limits if is_judged else {})})
            if not is_early:
                rows.append({"what": "the rest", "verdict": "no time left"})
        except Exception as error:  # the other measurements are worth having all the same
            said = " ".join(f"WRONG: {type(error).__name__}: {error}".split())
            rows.append({"what": "failed", "verdict": said[:500]})
        if compiler.failures:  # what has failed once is eager from there on
            rows.append({"what": "eager", "verdict": f"WRONG: not compiled: {', '.join(compiler.failures)}"})
        common.free_memory(args.device)  # for the child processes of what comes next
        failed += [f"{name} ({row['what']})" for row in rows if row["verdict"].startswith("WRONG")]
        everything += [{"table": name, **row, **conditions} for row in rows]
        if args.json:
            write_json(args.json, everything)
        print(f"\n{name}")
        common.print_table(rows)
    print(f"failed: {', '.join(failed) or 'nothing'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    run_script(main)
