"""The figure of bench/estimators.py."""
import torch
from estimator_runs import Point
from matplotlib.figure import Figure


def draw(curves: dict[str, list[list[Point]]], path: str) -> None:
    """Mean held-out loss of each row's runs over passes and over seconds, a deviation's band, to a .png or .svg."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = [(line, marker) for marker in "os^Dvx" for line in ("-", "--", ":")]
    for (name, runs), (line, marker) in zip(curves.items(), styles):
        losses = torch.tensor([[point.loss for point in points] for points in runs])
        mean, spread = losses.mean(0), losses.std(0) if len(runs) > 1 else losses.std(0, correction=0)
        for axis, position in zip(axes, (0, 1)):
            x = torch.tensor([[point[position] for point in points] for points in runs], dtype=torch.float64).mean(0)
            drawn, = axis.plot(x, mean, line, marker=marker, markevery=3, markersize=4, linewidth=1.2, label=name)
            axis.fill_between(x, mean - spread, mean + spread, color=drawn.get_color(), alpha=0.2)
    m0_loss = next(iter(curves.values()))[0][0].loss
    axes[0].set(xlabel="forward passes of 32 x 128 bytes (a backward counts as two)",
                ylabel="held-out loss of the most probable mask (nats a byte)", ylim=(None, m0_loss + 0.1))
    axes[1].set(xlabel="seconds of one thread")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
