"""Draws the pictures of README and docs from the records: docs/results.png, docs/minutes.png,
docs/sampled_masks.png.

    python reproduce/picture.py
"""

import sys
from statistics import mean

from record import POINTS, recovered
from rows import MASKPRO
from tables import ROOT, of_accuracy, over_minutes, record, smollm2

sys.path.insert(0, str(ROOT))
from utils import run_script

from matplotlib.figure import Figure

LEVELS = {"SparseGPT (updates weights)": "1of4/sparsegpt", "Wanda": "1of4/wanda"}
BARS = {
    "SparseGPT (changes weights)": "2of4/sparsegpt",
    "MaskPro (the paper), 10,000 steps": MASKPRO[10000],
    "MaskLLM, 280 steps": "2of4/rival-maskllm-lr0.001-both-steps280",
    "straight-through with Adam, 280 steps": "2of4/rival-scores_ste-lr0.01-both-steps280",
    "ours: sparsify.py, 280 steps": "2of4/sparsify-allafter-both-steps280",
    "ours, channels reordered, 459 steps": "2of4/sparsify-permuted-allafter-both-minutes120",
}


def main() -> None:
    results()
    minutes()
    sampled_masks()


def results() -> None:
    """Draw the shares recovered of Wanda's losses on SmolLM2-135M, in the logarithm of perplexity
    and in accuracy."""
    bars = {label: name for label, name in BARS.items() if smollm2(name)}
    figure = Figure(figsize=(7, 0.5 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(bars.values()):
        perplexity = mean(
            recovered(smollm2(name), name, seed["nats"]) for seed in smollm2(name)[name]
        )
        for share, place, colour in (
            (perplexity, 0.2, "C0"),
            (mean(of_accuracy(name)), -0.2, "C1"),
        ):
            drawn = axes.barh(number + place, share, 0.38, color=colour)
            axes.bar_label(drawn, [round(share)], padding=3, fontsize="small")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set(
        yticks=range(len(bars)),
        yticklabels=bars,
        xlim=(-12, 100),
        xlabel="recovered of what Wanda's mask lost (%)",
    )
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    axes.legend(axes.containers[:2], ["in perplexity", "in accuracy"], loc="lower right")
    figure.savefig(ROOT / "docs/results.png", dpi=130)


def minutes() -> None:
    """Draw the share of the loss recovered over minutes, on the small model."""
    rows = record("small_model")["rows"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    points = over_minutes()
    for method, marker in zip(dict.fromkeys(point[0] for point in points), "os"):
        axes.plot(
            *zip(*[point[2:] for point in points if point[0] == method]),
            marker=marker,
            label=method,
        )
    for method, row in LEVELS.items():
        share = recovered(rows, row, rows[row][0]["nats"])
        axes.axhline(share, color="gray", linewidth=0.8)
        axes.text(
            1.01, share, method, transform=axes.get_yaxis_transform(), va="center", fontsize="small"
        )
    axes.set(
        xscale="log",
        xlabel="minutes, one thread",
        ylabel="of Wanda's loss recovered (%)",
        ylim=(-8, 100),
    )
    axes.set_xticks([0.3, 1, 3, 10], labels=["0.3", "1", "3", "10"], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs/minutes.png", dpi=130)


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
