"""Draws the pictures of README and docs from the records: docs/results.png and
docs/sampled_masks.png.

    python reproduce/picture.py
"""

import sys
from functools import partial
from pathlib import Path
from statistics import mean

from record import POINTS
from rows import CURVES, LEVELS, MASKPRO, STEPS, record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import run_script

from matplotlib.figure import Figure
from smollm2_tables import of_accuracy, of_perplexity, smollm2

MEASURES = {
    "WikiText-2": of_perplexity,
    "Brown": partial(of_perplexity, text="Brown"),
    "accuracy": of_accuracy,
}


def main() -> None:
    results()
    sampled_masks()


def results() -> None:
    """Draw the shares closed of Wanda's gaps on SmolLM2-135M over the number of steps."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (title, share_of) in zip(panels, MEASURES.items()):
        for marker, (method, row) in zip("oDs^", CURVES.items()):
            shares = {steps: share_of(row.format(steps)) for steps in STEPS}
            points = [(steps, mean(found)) for steps, found in shares.items() if found]
            axes.plot(*zip(*points), marker=marker, fillstyle="none", label=method)
        for number, (method, row) in enumerate(LEVELS.items()):
            for share in share_of(row)[:1]:
                axes.axhline(share, color="gray", linestyle=[":", "--"][number], label=method)
        axes.set(title=title, xscale="log", xlabel="steps")
        axes.set_xticks(STEPS, labels=[f"{steps:,}" for steps in STEPS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="closed of Wanda's gap (%)", ylim=(-8, 100))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(ROOT / "docs/results.png", dpi=130)


def sampled_masks() -> None:
    """Draw how much better than m0 the sampled masks of MaskPro's runs are over their steps."""
    (row,) = record("variance_smollm2")["rows"]
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    runs = [smollm2(MASKPRO[steps])[MASKPRO[steps]][0]["run"] for steps in (10000, 2000)]
    for number, run in enumerate([record("maskpro_lr0.03"), *runs]):
        eta = run["arguments"]["lr"]
        steps = [(point + 0.5) * run["steps"] / POINTS for point in range(POINTS)]
        better = [-residual for residual in run["residuals"]]
        promised = [row["m0"] - row["drawn"] + eta * row["signal"] * step for step in steps]
        axes.plot(steps, better, color=f"C{number}", label=f"η {eta}")
        axes.plot(steps, promised, "--", color=f"C{number}")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.plot([], [], "--", color="gray", label="as first steps promise")
    axes.set(xlabel="steps", ylabel="better than m0 (nats)", ylim=(None, 0.5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(ROOT / "docs/sampled_masks.png", dpi=130)


if __name__ == "__main__":
    run_script(main)
