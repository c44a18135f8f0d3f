"""The pictures of runs, made from run folders written here, and the two benches that go with masks at rest and at work.

What is drawn is held against the numbers that were written: texts are read back from the .svg, curves and maps from the
functions that compute them.
"""
import json
import os
import subprocess
import sys
from math import isnan
from pathlib import Path
from xml.etree import ElementTree

from utils import UserError

import pytest

import plot
from files.records import read_lines
from training import figures

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
KINDS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
BLOCKS = {f"model.layers.{depth}.{kind}": 10 * (i + 1) for depth in range(3) for i, kind in enumerate(KINDS)}


def metrics_of(steps: int, baseline: bool = True, heldout: bool = True) -> list[dict]:
    lines = [{"step": t, "loss": 5 + 1 / t, "baseline": 5.0 if baseline else None, "advantage": 1 / t,
              "delta": 0.01 * t if baseline else None, "seconds": float(t)} for t in range(1, steps + 1)]
    if heldout:
        lines[-1]["heldout"] = 4.5
    return lines


def layers_of(steps: int, blocks: dict = BLOCKS) -> list[dict]:
    return [{"step": t, "changed": {name: 0.01 * t * (i % 3) for i, name in enumerate(blocks)},
             "entropy": {name: 0.1 * (i % 3) for i, name in enumerate(blocks)}, "blocks": blocks}
            for t in range(1, steps + 1, 2)]


def write_run(folder: Path, steps: int = 6, layers: bool = True, n: int = 2, m: int = 4, **kinds) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"arguments": {"sparsity_type": [n, m], "lr": 50}}))
    for name, lines in [("metrics", metrics_of(steps, **kinds)), ("layers", layers_of(steps) if layers else [])]:
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(path: Path) -> list[str]:
    """The texts in an .svg, which must be XML."""
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def check_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_a_run_gets_its_pictures(tmp_path, capsys):
    run = write_run(tmp_path / "learned")
    plot.main([str(run)])
    assert sorted(os.listdir(run)) == ["layers.jsonl", "layers.png", "layers.svg", "metrics.jsonl", "plot.png",
                                       "plot.svg", "run.json"]
    check_png(run / "plot.png")
    check_png(run / "layers.png")
    said = texts(run / "plot.svg")
    for label in (figures.LOSS, figures.RESIDUAL, figures.TRACKER, figures.CHANGED, figures.HELDOUT, "step", "learned",
                  "m0", "entropy (nats a block, at most 1.792)"):  # log C(4, 2)
        assert label in said
    said = texts(run / "layers.svg")
    assert {"q_proj", "k_proj", "down_proj", "0", "1", "2", "depth", figures.CHANGED, "learned"} <= set(said)
    output, errors = capsys.readouterr()
    assert output == f"pictures -> {run}/plot.png, {run}/plot.svg, {run}/layers.png, {run}/layers.svg\n" and not errors


def test_what_a_run_lacks_is_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "vanilla", layers=False, baseline=False, heldout=False)
    plot.main([str(run)])
    said = texts(run / "plot.svg")
    assert figures.LOSS in said
    assert not {figures.RESIDUAL, figures.TRACKER, figures.CHANGED, figures.ENTROPY, figures.HELDOUT} & set(said)
    assert not (run / "layers.svg").exists()
    assert capsys.readouterr().err == f"{run}/layers.jsonl has no line: the run's changes and entropy are left out\n"


def test_several_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("a/learned"))
    write_run(Path("b/learned"), layers=False, baseline=False)
    write_run(Path("$x_1$ & <c>"), n=4, m=8)
    plot.main(["a/learned", "b/learned", "$x_1$ & <c>"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "comparison-layers.png", "comparison-layers.svg", "comparison.png", "comparison.svg"]
    said = texts(tmp_path / "comparison.svg")
    assert {"a/learned", "b/learned", "$x_1$ & <c>", figures.ENTROPY} <= set(said)  # of no one N:M: no maximum
    said = texts(tmp_path / "comparison-layers.svg")
    assert {"a/learned", "$x_1$ & <c>"} <= set(said) and "b/learned" not in said
    plot.main(["a/learned", "--out", "new/folder/one"])
    assert sorted(os.listdir("new/folder")) == ["one-layers.png", "one-layers.svg", "one.png", "one.svg"]


def test_pictures_are_not_overwritten(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "layers.svg").write_text("mine")
    with pytest.raises(UserError, match=r"layers.svg exists already; choose another --out PREFIX"):
        plot.main([str(run)])
    assert (run / "layers.svg").read_text() == "mine" and not (run / "plot.png").exists()


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "{", "\x00\x00\x00", '{"step": 7, "loss": 5.0, "baseline": nul\n'])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    run = write_run(tmp_path / "run")
    for name, fits, lines in [("metrics.jsonl", plot.is_step, metrics_of(6)),
                              ("layers.jsonl", plot.is_state, layers_of(6))]:
        with open(run / name, "a") as file:
            file.write(torn)
        assert read_lines(run / name, fits) == lines


def test_one_step_is_enough(tmp_path):
    plot.main([str(write_run(tmp_path / "run", steps=1))])
    check_png(tmp_path / "run" / "plot.png")


DAMAGED = {
    "metrics.jsonl: line 1 is damaged": ("metrics.jsonl", '{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n'),
    "metrics.jsonl: line 2 is damaged": ("metrics.jsonl", '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": "1.0"}\n'),
    "metrics.jsonl: line 3 is damaged": ("metrics.jsonl", '{"step": 1, "loss": 1.0}\n' * 2 + "[]\n"),
    "metrics.jsonl: line 1 is damaged; delete it": ("metrics.jsonl", '{"step": 1, "loss": NaN}\n'),
    "metrics.jsonl holds no step yet": ("metrics.jsonl", ""),
    "metrics.jsonl cannot be read": ("metrics.jsonl", None),
    "run.json cannot be read": ("run.json", None),
    "run.json is damaged": ("run.json", "{"),
    "run.json is damaged: its arguments have no": ("run.json", '{"arguments": {"sparsity_type": [4, 2]}}'),
    "layers.jsonl: line 1 is damaged": (
        "layers.jsonl", '{"step": 1, "changed": {"a": 0.1}, "entropy": {"a": 0.1}, "blocks": {"b": 1}}\n'),
    "layers.jsonl: line 1 is damaged; delete": (
        "layers.jsonl", '{"step": 1, "changed": {"a": 0.1}, "entropy": {"a": 0.1}, "blocks": {"a": 0}}\n')}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_run_is_an_error(tmp_path, message):
    run = write_run(tmp_path / "run")
    name, content = DAMAGED[message]
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        plot.main([str(run)])
    assert not [name for name in os.listdir(run) if name.endswith(("png", "svg"))]


def test_no_run_at_all(tmp_path):
    (tmp_path / "file").touch()
    for wrong in ("nowhere", "file"):
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be read .*; give run folders that train.py wrote"):
            plot.main([str(tmp_path / wrong)])
    assert os.listdir(tmp_path) == ["file"]


def test_curves_are_what_was_written():
    metrics, layers = metrics_of(40), layers_of(5)
    drawn = figures.curves(metrics, layers)
    assert drawn[figures.RESIDUAL] == [(line["step"], line["loss"] - line["baseline"]) for line in metrics]
    assert drawn[figures.HELDOUT] == [(40, 4.5)]
    for label, key, scale in ((figures.CHANGED, "changed", 100), (figures.ENTROPY, "entropy", 1)):
        for (step, value), line in zip(drawn[label], layers, strict=True):
            each_block = [share for name, share in line[key].items() for _ in range(BLOCKS[name])]
            assert step == line["step"] and value == pytest.approx(scale * sum(each_block) / len(each_block))


def test_the_running_mean(tmp_path):
    """The last point of the line is the mean of the last 32 losses."""
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    points = [(t, float(t * t)) for t in range(50)]
    figures._draw(axes, figures.LOSS, {"run": points})
    dots, line = axes.lines[:2]
    assert list(dots.get_ydata()) == [value for _, value in points]
    assert line.get_ydata()[-1] == pytest.approx(sum(value for _, value in points[-32:]) / 32)
    assert line.get_ydata()[0] == 0


def test_layers_find_their_place():
    shares = {"model.layers.10.mlp.c_proj": 0.1, "model.layers.2.mlp.c_proj": 0.2, "model.layers.2.attn.c_proj": 0.3,
              "model.layers.2.experts.0.w1": 0.4, "model.layers.2.experts.1.w1": 0.8, "model.project_in": 0.5}
    blocks = {name: 3 if name.endswith("1.w1") else 1 for name in shares}
    kinds, depths, grid = figures.layer_grid({"step": 1, "changed": shares, "blocks": blocks})
    assert kinds == ["mlp.c_proj", "attn.c_proj", "experts.w1", "model.project_in"] and depths == [2, 10, None]
    seen = {(kind, depth): share for kind, row in zip(kinds, grid) for depth, share in zip(depths, row)
            if not isnan(share)}
    assert seen == pytest.approx({("mlp.c_proj", 2): 20, ("mlp.c_proj", 10): 10, ("attn.c_proj", 2): 30,
                                  ("experts.w1", 2): 70, ("model.project_in", None): 50})
    assert [figures.shortest(kind, kinds) for kind in kinds] == ["mlp.c_proj", "attn.c_proj", "w1", "project_in"]
    assert figures.place("projector.2") == (2, "projector")


def test_the_learning_curve(tmp_path):
    for baseline in (True, False):
        path = tmp_path / f"{baseline}.svg"
        figures.learning_curve({"a": metrics_of(40, baseline=baseline), "b": metrics_of(3)}, path)
        assert {figures.RESIDUAL if baseline else figures.LOSS, "a", "b", "step"} <= set(texts(path))
    figures.learning_curve({"a": metrics_of(2)}, str(tmp_path / "curve.png"))
    check_png(tmp_path / "curve.png")


# --------------------------------------------------------------------------------------------------------- the command


def shell(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_mistake_is_one_line(tmp_path):
    done = shell("plot.py", tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_sparse_inference_says_what_it_needs():
    done = shell("bench/sparse_inference.py", "--quick", "--device", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.startswith("error: 2:4 products need an NVIDIA GPU")
