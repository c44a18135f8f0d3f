"""Draw docs/minutes.png, the README's picture, from the record that minutes.sh left.

    python reproduce/picture.py
"""
import sys

from record import recovered
from tables import ROOT, over_minutes, record

sys.path.insert(0, str(ROOT))
from utils import run_script

from matplotlib.figure import Figure

LEVELS = {"SparseGPT (updates weights)": "1of4/sparsegpt", "Wanda": "1of4/wanda"}


def main() -> None:
    rows = record("small_model")["rows"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    points = over_minutes()
    for (method, marker) in zip(dict.fromkeys(point[0] for point in points), "os"):
        axes.plot(*zip(*[point[2:] for point in points if point[0] == method]), marker=marker, label=method)
    for method, row in LEVELS.items():
        share = recovered(rows, row, rows[row][0]["nats"])
        axes.axhline(share, color="gray", linewidth=0.8)
        axes.text(1.01, share, method, transform=axes.get_yaxis_transform(), va="center", fontsize="small")
    axes.set(xscale="log", xlabel="minutes, one thread", ylabel="of Wanda's loss recovered (%)", ylim=(-8, 100))
    axes.set_xticks([0.3, 1, 3, 10], labels=["0.3", "1", "3", "10"], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs/minutes.png", dpi=130)


if __name__ == "__main__":
    run_script(main)
