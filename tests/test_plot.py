"""Learning curves of runs, read back from the .svg."""

import os
from pathlib import Path
from xml.etree import ElementTree

import plot
from training import figures
from utils import UserError

import pytest
from matplotlib.figure import Figure
from quizzes import write_lines


def metrics_of(steps: int, baseline: bool = True, heldout: bool = True) -> list[dict]:
    lines = [
        {"step": t, "loss": 5 + 1 / t, "baseline": 5.0 if baseline else None, "advantage": 1 / t}
        for t in range(1, steps + 1)
    ]
    return [*lines[:-1], {**lines[-1], "heldout": 4.5}] if heldout else lines


def write_run(folder: Path, steps: int = 6, **kinds) -> Path:
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", metrics_of(steps, **kinds))
    return folder


def texts(path: Path) -> set[str]:
    """The texts in an .svg, which must be XML."""
    return {
        element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    }


@pytest.mark.parametrize(
    "kinds, shown",
    [
        ({}, {figures.RESIDUAL, "m0", figures.HELDOUT}),
        ({"steps": 1}, {figures.RESIDUAL, "m0", figures.HELDOUT}),
        ({"baseline": False, "heldout": False}, {figures.TRAINING}),
    ],
)
def test_a_run_gets_its_picture(tmp_path, capsys, kinds, shown):
    run = write_run(tmp_path / "learned", **kinds)
    plot.main([str(run)])
    assert sorted(os.listdir(run)) == ["metrics.jsonl", "plot.png", "plot.svg"]
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    labels = {figures.RESIDUAL, figures.TRAINING, figures.HELDOUT, "m0"}
    assert texts(run / "plot.svg") & labels == shown
    assert {"step", f"{run}, mean of 32 steps"} <= texts(run / "plot.svg")
    assert capsys.readouterr().out == f"pictures -> {run}/plot.png, {run}/plot.svg\n"


def test_several_runs(tmp_path, monkeypatch):
    """What not all have is not drawn; a $ in a name is a dollar."""
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(Path("a/learned"))), str(write_run(Path("$x_1$ & <c>"), baseline=False))]
    plot.main(runs)
    lines = {f"{run}, mean of 32 steps" for run in runs}
    assert lines | {figures.TRAINING, figures.HELDOUT} <= texts(tmp_path / "comparison.svg")
    plot.main([runs[0], "--out", "new/folder/one"])
    assert sorted(os.listdir("new/folder")) == ["one.png", "one.svg"]
    with pytest.raises(
        UserError, match=r"new/folder/one.png exists already; choose another --out PREFIX"
    ):
        plot.main([runs[1], "--out", "new/folder/one"])


def test_a_run_without_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="has no step yet; wait"):
        plot.main([str(tmp_path)])
    assert not list(tmp_path.glob("plot.*"))


def test_curves_are_what_was_written():
    runs = {"a": metrics_of(40), "b": metrics_of(3, heldout=False)}
    assert figures.curves(runs) == {
        figures.RESIDUAL: {
            name: [(line["step"], line["loss"] - 5) for line in lines]
            for name, lines in runs.items()
        },
        figures.HELDOUT: {"a": [(40, 4.5)], "b": []},
    }


def test_lines_and_levels():
    """Dots are all losses, the line ends at the mean of the last 32; runs differ in style; levels
    are flat."""
    axes = Figure().subplots()
    points = [(t, float(t * t)) for t in range(50)]
    figures._draw(axes, figures.TRAINING, {"a": points, "b": points}, {"dense": 3.0})
    dots, line, _, other, level = axes.lines
    assert list(dots.get_ydata()) == [value for _, value in points]
    assert line.get_ydata()[-1] == pytest.approx(sum(value for _, value in points[-32:]) / 32)
    assert line.get_linestyle() != other.get_linestyle() and line.get_marker() != other.get_marker()
    assert list(level.get_ydata()) == [3, 3] and level.get_label() == "dense"
