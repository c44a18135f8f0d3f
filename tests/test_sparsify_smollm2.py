"""reproduce/sparsify_smollm2.py: its commands are parsed by the scripts that they name, its table is computed from what
those write, and nothing is made twice. The scripts themselves do not run here."""
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import eval as evaluate
import prune
import sparsify

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"prune.py": prune, "eval.py": evaluate, "sparsify.py": sparsify}
PERPLEXITIES = {"dense": 20.0, "wanda": 160.0, "given0": 40.0, "given1": 50.0, "reordered0": 30.0, "reordered1": 30.0}
_spec = importlib.util.spec_from_file_location("sparsify_smollm2", ROOT / "reproduce/sparsify_smollm2.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.fixture
def series(monkeypatch, tmp_path):
    """Flags -> the arguments of the runs that were made; each script leaves what it would write."""
    ran = []

    def run(command, cwd, check):
        name, flags = command[1], command[2:]
        args = SCRIPTS[name].parse_args(flags) if flags[0] != "--resume" else SimpleNamespace(resume=flags[1])
        if name == "eval.py":
            value = next(value for row, value in PERPLEXITIES.items() if Path(args.save).name.startswith(row))
            record, found = Path(args.save), {"nats": math.log(value), "mean_acc": value / 1000}
        elif name == "prune.py":
            record, found = Path(args.save_model, "prune.json"), {"summary": {"seconds": 30}}
        else:
            ran.append(args)
            record = Path(args.resume or args.out, "report.json")
            found = {"stages": {"text": {"seconds": 100}, "learning": {"seconds": 200}}}
        assert not record.exists()
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found))
        return SimpleNamespace(returncode=0)

    def made(flags=""):
        ran.clear()
        script.main(f"--ppl a.txt b.txt --seeds 0 1 --out {tmp_path}/out {flags}".split())
        return list(ran)
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "MODEL", tmp_path)
    return made


def test_its_table(series, capsys):
    series("--task_file quiz.jsonl")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
            if line.startswith("| ")]
    closed = [math.log(160 / x) / math.log(8) * 100 for x in (40, 50)]
    gap = f"{sum(closed) / 2:.2f} ± {abs(closed[0] - closed[1]) / 2**0.5:.2f}"
    assert rows[2:] == [
        ["dense", "20.00", "", "20.00", "", "2.00", "", ""],
        ["Wanda", "160.00", "", "160.00", "", "16.00", "", "0.5"],
        ["learned", "45.00 ± 7.07", gap, "45.00 ± 7.07", gap, "4.50 ± 0.71", "82.14 ± 5.05", "5.0"],
        ["learned --permute", *["30.00 ± 0.00", f"{100 * math.log(160 / 30) / math.log(8):.2f} ± 0.00"] * 2,
         "3.00 ± 0.00", "92.86 ± 0.00", "5.0"]]


def test_what_it_runs(series):
    flags = "--steps 7 --dataset quiz.jsonl text{seed}.jsonl --distill 0.5"
    assert [(args.seed, args.permute, args.steps, args.distill, args.dataset) for args in series(flags)] == [
        (seed, permute, 7, 0.5, ["quiz.jsonl", f"text{seed}.jsonl"]) for permute in (False, True) for seed in (0, 1)]
    assert series(flags) == []
    assert len(series("--steps 8")) == 4


def test_a_series_that_was_interrupted_goes_on(series):
    last = Path(series("--steps 7")[-1].out)
    (last / "report.json").unlink()
    assert [args.resume for args in series("--steps 7")] == [str(last)]
