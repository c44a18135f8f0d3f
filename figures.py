"""Pictures of runs, readable in grey."""
from pathlib import Path

from utils import UserError


def learning_curve(runs: dict[str, list[dict]], path: str | Path) -> None:
    """Draw the loss of the sampled masks against m0 over the steps, one line a run, to a .png or .svg.

    runs: name -> the lines of metrics.jsonl. Where a run has baselines the residual f(m_t) - f(m0) is drawn, whose zero
    is m0 itself; else the loss. Dots are steps, the line their mean over the last 32.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is missing; install it with: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    residual = all(line["baseline"] is not None for lines in runs.values() for line in lines)
    for (name, lines), style in zip(runs.items(), ["-", "--", ":", "-."] * len(runs)):
        values = [line["loss"] - (line["baseline"] if residual else 0) for line in lines]
        steps = [line["step"] for line in lines]
        windows = [values[max(0, i - 31):i + 1] for i in range(len(values))]
        dots, = axes.plot(steps, values, ".", markersize=2, alpha=0.4)
        axes.plot(steps, [sum(w) / len(w) for w in windows], style, color=dots.get_color(), label=name)
    if residual:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the sampled mask - loss of m0 (nats)" if residual else "loss of the sampled mask (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
