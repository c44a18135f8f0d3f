"""Pictures of runs, readable in grey: curves over the steps, and a map of the layers.

Runs differ by line style and marker as well as by colour, and the map's colours fall steadily in brightness. Every
picture is drawn once and saved under each of its paths, whose endings (.png, .svg) choose the format.
"""
from contextlib import contextmanager
from math import isnan, nan
from pathlib import Path

from utils import UserError

from files.atomic import atomic_write

Paths = list[str | Path]
WINDOW = 32  # steps that a running mean goes over
LINES, MARKERS = ["-", "--", "-.", ":"], ["o", "s", "^", "D", "v", "P", "X", "*"]
LOSS, RESIDUAL = "loss of the sampled mask (nats)", "loss - loss of m0 (nats)"
TRACKER, CHANGED = "tracker δ (nats)", "blocks changed from m0 (%)"
ENTROPY, HELDOUT = "entropy (nats a block)", "held-out loss (nats)"


@contextmanager
def _figure(paths: Paths, rows: int, columns: int, size: tuple[float, float], heights: list[int] | None = None):
    """A figure of `size` inches and its axes, row by row, of relative heights; saved to all paths when the block ends
    well."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing; install it with: pip install matplotlib")
    # Text stays text in an .svg, and a $ in a run's name is a dollar.
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat)
        for path in paths:
            with atomic_write(path) as beside:
                figure.savefig(beside, format=Path(path).suffix[1:], dpi=150)


def _mean_over_blocks(line: dict, key: str) -> float:
    """The mean of a line of layers.jsonl over all blocks: its layers' values, each weighted by its blocks."""
    return sum(value * line["blocks"][name] for name, value in line[key].items()) / sum(line["blocks"].values())


def curves(metrics: list[dict], layers: list[dict]) -> dict[str, list[tuple]]:
    """A run's curves: label with unit -> points (step, value), none where metrics.jsonl and layers.jsonl have none."""
    def recorded(key: str) -> list[tuple]:
        return [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return {LOSS: recorded("loss"),
            RESIDUAL: [(line["step"], line["loss"] - line["baseline"]) for line in metrics
                       if line.get("baseline") is not None],
            TRACKER: recorded("delta"),
            CHANGED: [(line["step"], 100 * _mean_over_blocks(line, "changed")) for line in layers],
            ENTROPY: [(line["step"], _mean_over_blocks(line, "entropy")) for line in layers],
            HELDOUT: recorded("heldout")}


def _draw(axes: object, label: str, runs: dict[str, list[tuple]]) -> None:
    """One curve of every run that has it: name -> points (step, value). Losses of sampled masks, which scatter, are
    dots and their running mean."""
    import matplotlib
    scattered = label in (LOSS, RESIDUAL)
    for i, (name, points) in enumerate(runs.items()):
        if not points:
            continue
        steps, values = zip(*points)
        colour, every = matplotlib.colormaps["viridis"](0.8 * i / len(runs)), -(-len(points) // 8)
        if scattered:  # one picture of all dots, lest an .svg hold thousands of shapes
            size, alpha = (2, 0.2) if len(points) > 300 else (5, 0.4)
            axes.plot(steps, values, ".", color=colour, markersize=size, alpha=alpha / len(runs), zorder=1,
                      rasterized=True)
            windows = [values[max(0, t - WINDOW + 1):t + 1] for t in range(len(values))]
            values = [sum(window) / len(window) for window in windows]
        axes.plot(steps, values, color=colour, linewidth=1.2, linestyle=LINES[i % len(LINES)],
                  marker=MARKERS[i % len(MARKERS)], markersize=4, markevery=(i * every // len(runs), every), label=name)
    if label == RESIDUAL:
        axes.axhline(0, color="black", linewidth=0.8)
        axes.text(1.01, 0, "m0", transform=axes.get_yaxis_transform(), va="center")
    if scattered:
        axes.plot([], [], ".", color="grey", label=f"one step (line: mean of the last {WINDOW})")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(nbins=6, integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)


def learning_curve(runs: dict[str, list[dict]], path: str | Path) -> None:
    """Draw the loss of the sampled masks against m0 over the steps, one line a run, to a .png or .svg.

    runs: name -> the lines of metrics.jsonl. Where all runs have baselines the residual f(m_t) - f(m0) is drawn, whose
    zero is m0 itself; else the loss.
    """
    residual = all(line["baseline"] is not None for metrics in runs.values() for line in metrics)
    label = RESIDUAL if residual else LOSS
    with _figure([path], 1, 1, (7, 4)) as (figure, [axes]):
        _draw(axes, label, {name: curves(metrics, [])[label] for name, metrics in runs.items()})
        figure.legend(loc="outside lower center", ncols=2)


def panels(metrics: dict[str, list[dict]], layers: dict[str, list[dict]], most_nats: float | None,
           paths: Paths) -> None:
    """Draw every curve that a run has, a panel each, all runs in every panel.

    metrics, layers: name -> lines of metrics.jsonl and of layers.jsonl (none where the run has none); most_nats: the
    greatest entropy a block can have, log C(M,N), or None where the runs differ in it.
    """
    drawn = {name: curves(metrics[name], layers[name]) for name in metrics}
    labels = [label for label in (LOSS, RESIDUAL, TRACKER, CHANGED, ENTROPY, HELDOUT)
              if any(run[label] for run in drawn.values())]
    rows, columns = -(-len(labels) // 2), min(2, len(labels))
    with _figure(paths, rows, columns, (5 * columns, 3.2 * rows + 0.6)) as (figure, axes):
        for label, panel in zip(labels, axes):
            _draw(panel, label, {name: run[label] for name, run in drawn.items()})
            if label == ENTROPY and most_nats:
                panel.set_ylabel(f"entropy (nats a block, at most {most_nats:.3f})")
        handles, names = axes[0].get_legend_handles_labels()
        if len(labels) < len(axes):
            axes[-1].axis("off")
            axes[-1].legend(handles, names, loc="center")
        else:
            figure.legend(handles, names, loc="outside lower center", ncols=columns)


def place(name: str) -> tuple[int | None, str]:
    """A layer's depth, the first number in its name (None: it has none), and its kind, what follows it (else leads it).

    Further numbers, such as an expert's, are left out: model.layers.3.mlp.experts.7.w1 -> 3, mlp.experts.w1.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return None, name
    before, after = parts[:numbers[0]], [part for part in parts[numbers[0] + 1:] if not part.isdecimal()]
    return int(parts[numbers[0]]), ".".join(after or before)


def shortest(kind: str, kinds: list[str]) -> str:
    """The fewest last components of a kind that no other kind ends in."""
    parts = kind.split(".")
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1), kind)


def layer_grid(line: dict) -> tuple[list[str], list[int | None], list[list[float]]]:
    """A line of layers.jsonl as a table: kinds, depths (ascending, then None if a name has no number), and the share of
    blocks changed `[kinds][depths]` in %: of all layers in that place together, nan where there is none."""
    blocks, changed = {}, {}
    for name, share in line["changed"].items():
        depth, kind = place(name)
        blocks[kind, depth] = blocks.get((kind, depth), 0) + line["blocks"][name]
        changed[kind, depth] = changed.get((kind, depth), 0) + share * line["blocks"][name]
    kinds = list(dict.fromkeys(kind for kind, _ in blocks))
    depths = sorted({depth for _, depth in blocks}, key=lambda depth: (depth is None, depth))
    if len(kinds) > 300 or len(depths) > 10_000:
        raise UserError(f"layers.jsonl has {len(kinds)} kinds of layers at {len(depths)} depths, too many to draw; "
                        "remove it to draw the other curves")
    shares = [[100 * changed[kind, depth] / blocks[kind, depth] if (kind, depth) in blocks else nan
               for depth in depths] for kind in kinds]
    return kinds, depths, shares


def layer_maps(last: dict[str, dict], paths: Paths) -> None:
    """Draw one map a run of where its blocks changed: kinds of layers down, depth across, all runs in one scale.

    last: name -> a line of layers.jsonl. Layers without a number in their name have the last column, marked "-";
    hatched: there is no such layer, or it was not learned.
    """
    grids = {name: layer_grid(line) for name, line in last.items()}
    rows = [len(kinds) for kinds, _, _ in grids.values()]
    columns = max(len(depths) for _, depths, _ in grids.values())
    most = max(share for _, _, shares in grids.values() for row in shares for share in row if not isnan(share))
    size = min(10, 5 + 0.2 * columns), max(2.6, 0.3 * sum(rows) + 1.2 * len(rows))
    with _figure(paths, len(grids), 1, size, rows) as (figure, axes):
        for (name, (kinds, depths, shares)), panel in zip(grids.items(), axes):
            image = panel.pcolormesh(shares, cmap="viridis_r", vmin=0, vmax=most or 1, edgecolors="white",
                                     linewidth=0.5)
            panel.patch.set(hatch="////", edgecolor="0.7")
            panel.invert_yaxis()
            panel.set_yticks([i + 0.5 for i in range(len(kinds))], [shortest(kind, kinds) for kind in kinds])
            every = next((step for step in (1, 2, 5, 10, 20) if len(depths) <= 20 * step), 50)
            shown = [i for i, depth in enumerate(depths) if depth is None or i % every == 0]
            panel.set_xticks([i + 0.5 for i in shown], ["-" if depths[i] is None else str(depths[i]) for i in shown])
            panel.tick_params(length=0)
            panel.set_xlabel("depth (-: no number in the layer's name)" if None in depths else "depth")
            line, overall = last[name], 100 * _mean_over_blocks(last[name], "changed")
            panel.set_title(f"{name}\nstep {line['step']}: {overall:.3g} % of {sum(line['blocks'].values()):,} blocks",
                            fontsize="medium")
        figure.colorbar(image, ax=axes, label=CHANGED, aspect=20 * len(axes))
