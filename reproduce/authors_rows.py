"""The rows of against_authors.py: what is compared, and by which measure."""

import math
from pathlib import Path
from statistics import fmean, stdev

from files import mask_files
from files.records import read_lines
from pge import Estimator, score

import numpy as np
import torch

SATURATED = 0.9  # probability of one weight above which its block counts as saturated
# runs per side -> limit of |t|, two-sided, 1% for 5 rows together
CRITICAL_T = {2: 22.33, 3: 7.17, 4: 5.21, 5: 4.50, 6: 4.14, 8: 3.79}


def baseline_file(folder: Path) -> Path:
    return next(folder.glob("inference_loss_*.np[yz]"))


def losses_of_theirs(run: Path) -> np.ndarray:
    return np.load(next(run.glob("results/*/loss_training.npy")))


def exact_row(
    what: str, left: object, right: object, difference: float, most: float | None
) -> list[str]:
    """Return a row of numbers that should agree to `most`, or are only shown if `most` is None."""
    wanted, verdict = (
        ("", "shown")
        if most is None
        else (f"≤ {most:g}", "same" if difference <= most else "DIFFERS")
    )
    return [what, str(left), str(right), f"{difference:.2g}", wanted, verdict]


def seeds_row(what: str, left: list[float], right: list[float]) -> list[str]:
    """Return a row that compares one number per seed on each side by a t-test, in units of the
    standard deviation of a run."""
    # at least 1e-6, to which the losses of equal masks agree
    spread = max(math.sqrt((stdev(left) ** 2 + stdev(right) ** 2) / 2), 1e-6)
    apart = fmean(right) - fmean(left)
    most = CRITICAL_T[len(left)] * math.sqrt(2 / len(left))
    cells = [f"{fmean(side):.4f} ± {stdev(side):.4f}" for side in (left, right)]
    return [
        what,
        *cells,
        f"{apart:+.4f}, {abs(apart) / spread:.1f} deviations",
        f"≤ {most:.1f} deviations",
        "same" if abs(apart) <= most * spread else "DIFFERS",
    ]


def score_rows(run: Path, baseline: np.ndarray, lr: float) -> list[list[str]]:
    """Return the rows that compare the authors' score, at recorded steps whose next step is
    recorded too."""
    steps: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for step, logits, mask in torch.load(run / "steps.pt"):
        steps.setdefault(step, []).append((logits.view(-1, 4), mask.view(-1, 4)))
    estimator = Estimator()
    losses = losses_of_theirs(run)
    advantages = [
        estimator.advantage(loss, baseline[step % len(baseline)])
        for step, loss in enumerate(losses)
    ]
    kinds: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    pairs = sorted(
        (step for step in steps if step + 1 in steps), key=lambda step: abs(advantages[step])
    )
    pairs = pairs[len(pairs) // 2 :]  # the largest moves, which suffer least from float32 rounding
    for step in pairs:
        for (before, mask), (after, _) in zip(steps[step], steps[step + 1]):
            # steps count from 1 and advantages from 0, so this is the advantage of step + 1
            found = (before.double() - after.double()) / (lr * advantages[step])
            exact = score(before.double(), mask)
            saturated = before.double().softmax(1).amax(1) > SATURATED
            for kind in kinds:
                kinds[kind].append(torch.stack([found, exact], 1)[saturated == kind])
    rows = []
    for kind, most, name in ((False, 1e-3, "other"), (True, None, "saturated")):
        found, exact = torch.cat(kinds[kind]).unbind(1)
        if len(found):
            rows.append(
                exact_row(
                    f"score, {len(found)} {name} blocks of {len(pairs)} steps: largest",
                    f"{found.abs().max():.4f}",
                    f"{exact.abs().max():.4f}",
                    float((found - exact).abs().max()),
                    most,
                )
            )
    return rows


def compare(
    a: Path, b: Path, seeds: int, lr: float
) -> tuple[list[list[str]], dict[str, np.ndarray], str]:
    """Return the rows, the losses `[seeds, steps]` of both sides, and the fingerprint of m0.

    a, b: folders of the authors' results and of ours.
    """
    m0, other = (
        mask_files.load(path).masks for path in (b / "initial_mask.safetensors", a / "initial_mask")
    )
    baseline = np.load(baseline_file(a))
    cached = np.load(baseline_file(b))["losses"]
    runs = range(seeds)
    logs = [read_lines(b / f"seed{seed}/metrics.jsonl") for seed in runs]
    curves = {
        "theirs": np.array([losses_of_theirs(a / f"seed{seed}") for seed in runs]),
        "ours": np.array([[line["loss"] for line in log] for log in logs]),
    }

    def changed(path: Path) -> float:
        masks = mask_files.load(path).masks
        blocks = torch.cat([(masks[name] ^ mask).view(-1, 4).any(1) for name, mask in m0.items()])
        return 100 * blocks.double().mean().item()

    unlike = math.inf
    if m0.keys() == other.keys():
        unlike = sum(int((other[name] ^ mask).sum()) for name, mask in m0.items())
    rows = [
        exact_row("mask: layers, weights that differ", len(other), len(m0), unlike, 0),
        exact_row(
            f"baseline, {len(cached)} minibatches: mean, largest difference (nats)",
            f"{baseline.mean():.6f}",
            f"{cached.mean():.6f}",
            float(abs(baseline - cached).max()),
            1e-6,
        ),
        *score_rows(a / "seed0", baseline, lr),
    ]
    for steps in np.array_split(np.arange(curves["ours"].shape[1]), 4):
        rows.append(
            seeds_row(
                f"loss, steps {steps[0] + 1} to {steps[-1] + 1} (nats)",
                *(curve[:, steps].mean(1).tolist() for curve in curves.values()),
            )
        )
    rows.append(
        seeds_row(
            "blocks changed at the end (%)",
            [changed(a / f"seed{seed}/learned_mask") for seed in runs],
            [changed(b / f"seed{seed}/mask.safetensors") for seed in runs],
        )
    )
    return rows, curves, mask_files.fingerprint(m0)
