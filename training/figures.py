"""Learning curves of runs. Runs differ in line style and marker as well as in colour, so that they
can be told apart in grey."""

import math
from pathlib import Path

from files.atomic import atomic_write

WINDOW = 32  # steps of the running mean
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
TRAINING = "training loss (nats)"
RESIDUAL = "loss of the sampled mask - loss of m0 (nats)"
HELDOUT = "held-out loss (nats)"  # on the text that selects the mask

Points = list[tuple[int, float]]  # step, value


def curves(runs: dict[str, list[dict]]) -> dict[str, dict[str, Points]]:
    """Return the curves to draw: axis label with unit -> run name -> points (step, value). The
    first label is for the training loss, the second is HELDOUT.

    runs: name -> the lines of metrics.jsonl. The first label is RESIDUAL if all lines have a
    baseline (the loss of m0 on the same minibatch), else TRAINING.
    """
    lines = [line for metrics in runs.values() for line in metrics]
    residual = all(line.get("baseline") is not None for line in lines)
    training = {
        name: [
            (line["step"], line["loss"] - line["baseline"] if residual else line["loss"])
            for line in metrics
        ]
        for name, metrics in runs.items()
    }
    heldout = {
        name: [
            (line["step"], line["heldout"]) for line in metrics if line.get("heldout") is not None
        ]
        for name, metrics in runs.items()
    }
    return {RESIDUAL if residual else TRAINING: training, HELDOUT: heldout}


def _draw(axes: object, label: str, runs: dict[str, Points], levels: dict[str, float]) -> None:
    """Draw a panel: one line per run, one horizontal line per level, and a legend below. A training
    loss, which scatters, is drawn as dots and their running mean."""
    for i, (name, points) in enumerate(runs.items()):
        steps, values = zip(*points) if points else ((), ())
        colour = f"C{i}"
        spacing = math.ceil(len(points) / 8) or 1
        if label != HELDOUT:  # rasterized, so that an .svg does not hold thousands of shapes
            axes.plot(
                steps,
                values,
                ".",
                color=colour,
                markersize=3,
                alpha=0.3 / len(runs),
                rasterized=True,
            )
            windows = [values[max(0, t - WINDOW + 1) : t + 1] for t in range(len(values))]
            values = [sum(window) / len(window) for window in windows]
            name = f"{name}, mean of {WINDOW} steps"
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            markevery=(i * spacing // len(runs), spacing),
            label=name,
        )
    for i, (name, value) in enumerate(levels.items()):
        axes.axhline(value, color="black", linewidth=1, linestyle=LINES[i % len(LINES)], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(nbins=6, integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    axes.set_title(
        "text that selects the mask" if label == HELDOUT else "dots: single steps", fontsize="small"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize="small", ncols=2)


def learning_curve(
    runs: dict[str, list[dict]],
    path: str | Path,
    levels: dict[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draw the training loss and, if it is known, the held-out loss over the steps, one line per
    run.

    runs: name -> the lines of metrics.jsonl; path: a .png or .svg file; levels: label -> loss in
    nats on the same held-out text, such as that of the dense model, drawn as horizontal lines in
    the held-out panel.
    """
    import matplotlib  # takes a second to import, which other scripts are spared
    from matplotlib.figure import Figure

    drawn = {label: points for label, points in curves(runs).items() if any(points.values())}
    # keep text as text in an .svg, and a $ in a run's name as a $
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False}),
        atomic_write(path) as tmp,
    ):
        figure = Figure(figsize=(6.5 * len(drawn), 5), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (label, points) in zip(panels, drawn.items()):
            levels_of = {RESIDUAL: {"m0": 0.0}, HELDOUT: levels or {}}
            _draw(axes, label, points, levels_of.get(label, {}))
        figure.savefig(tmp, format=Path(path).suffix[1:], dpi=150)
