"""What another busy process costs: OpenMP's threads spin while they wait, on cores that others want.

    python bench/busy.py [--quick] [--json FILE]

SmolLM2-135M's shape, 8 x 128 tokens, as many threads as there are cores: milliseconds of a forward pass and of a step
from gradients, alone and beside one process that computes all the time, for several settings of the environment. Each
is measured in a process of its own. The scripts set GOMP_SPINCOUNT=10000 unless the environment says otherwise.
"""
import argparse
import json
import os
import subprocess
import sys

import common
from utils import UserError, fast_dtype, run_script

import torch

from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from training.straight_through import StraightThrough

SETTINGS = {"default": {"GOMP_SPINCOUNT": ""}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
            "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"}, "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
            "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"}}
BUSY = "x = 1\nwhile True: x = x * 3 % 1000003"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # that is what it measures
    parser.add_argument("--measure", action="store_true", help="in this process, as its environment says")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a forward pass and of a step."""
    depth, repeats = (4, 3) if args.quick else (None, 7)
    model = common.random_llama("smollm2-135m", "cpu", fast_dtype("cpu"), args.seed, depth)
    batch = torch.randint(0, 49152, (8, 128))
    with torch.no_grad():
        forward_s = common.median_s(lambda: model(input_ids=batch, use_cache=False), "cpu", repeats)
    masked = MaskedModel(model, common.magnitude_masks(model, 2, 4), LinearSpace(2, 4), mode="eager")
    learner = StraightThrough(masked, distill=1.0)
    step_s = common.median_s(lambda: learner.learn(batch, 0.01), "cpu", 3)
    return {"forward": 1e3 * forward_s, "step": 1e3 * step_s}


def measured(environment: dict[str, str], args: argparse.Namespace, beside: bool) -> dict[str, float]:
    """`measure` in a process of this environment, alone or beside a busy one."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    busy = subprocess.Popen([sys.executable, "-c", BUSY]) if beside else None
    try:
        command = [sys.executable, __file__, "--measure", "--seed", str(args.seed), *["--quick"] * args.quick]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)
    finally:
        if busy:
            busy.kill()
            busy.wait()
    if done.returncode:
        raise UserError(f"it could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    rows = []
    for name in ("default", "GOMP_SPINCOUNT=10000") if args.quick else SETTINGS:
        alone, beside = (measured(SETTINGS[name], args, busy) for busy in (False, True))
        rows.append({"setting": name})
        for what in alone:
            rows[-1] |= {f"{what}, alone (ms)": alone[what], f"{what}, beside (ms)": beside[what],
                         f"{what}, ratio": beside[what] / alone[what]}
    common.report(rows, args)


if __name__ == "__main__":
    run_script(main)
