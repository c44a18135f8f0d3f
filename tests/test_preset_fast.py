"""reproduce/preset_fast.py: its commands are parsed by the scripts that they name, its table is computed from what
those write, and nothing is made twice. The scripts themselves do not run here."""
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest

import evaluate
import generate_text
import get_mask
import permute
import prune
import train
from files.documents import documents
from training import args as train_args

ROOT = Path(__file__).parent.parent
SCRIPTS = {"prune.py": prune, "get_mask.py": get_mask, "evaluate.py": evaluate, "generate_text.py": generate_text,
           "permute.py": permute}
PERPLEXITIES = {"dense": 20.0, "given_wanda": 160.0, "given0": 40.0, "given1": 50.0, "reordered0": 30.0,
                "reordered1": 30.0}


@pytest.fixture
def preset_fast(monkeypatch, tmp_path):
    """The script, whose runs are replaced: `commands` gets them, and each output is made as its script makes it."""
    monkeypatch.syspath_prepend(str(ROOT / "reproduce"))
    spec = importlib.util.spec_from_file_location("preset_fast", ROOT / "reproduce/preset_fast.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands = []

    def run(name, *flags):
        flags = [str(flag) for flag in flags]
        module.commands.append((name, flags))
        args = train_args.parse(train.__doc__, flags) if name == "train.py" else SCRIPTS[name].parse_args(flags)
        out = Path(vars(args).get("save_model") or vars(args).get("out") or args.save)
        assert not out.exists() and tmp_path in out.parents
        if name == "evaluate.py":
            learned = Path(args.mask).parent.name if args.mask and args.mask.endswith("/mask.safetensors") else None
            kind = re.match(r"[a-z]+\d", learned).group() if learned else "given_wanda" if args.mask else "dense"
            assert (args.model == str(tmp_path / "out/model")) == kind.startswith("reordered")
            out.write_text(json.dumps({"nats": math.log(PERPLEXITIES[kind]), "mean_acc": PERPLEXITIES[kind] / 1000}))
        else:
            out.mkdir()
    monkeypatch.setattr(module, "script", run)
    monkeypatch.setattr(module, "MODEL", tmp_path)
    yield module
    sys.modules.pop("demo", None)


def run(preset_fast, tmp_path, flags=""):
    preset_fast.main(f"--ppl a.txt b.txt --seeds 0 1 --steps 7 --tokens 900 --out {tmp_path}/out {flags}".split())


def test_its_table(preset_fast, tmp_path, capsys):
    run(preset_fast, tmp_path, "--task_file quiz.jsonl")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == ["20.00", "160.00", "45.00 ± 7.07", "30.00 ± 0.00"]
    closed = [math.log(160 / x) / math.log(8) * 100 for x in (40, 50)]
    mean = sum(closed) / 2
    assert rows[3][2] == rows[3][4] == f"{mean:.2f} ± {abs(closed[0] - closed[1]) / 2**0.5:.2f}"
    assert rows[3][5:7] == ["4.50 ± 0.71", f"{100 * 115 / 140:.2f} ± {100 * 10 / 140 / 2**0.5:.2f}"]


def test_what_it_runs(preset_fast, tmp_path):
    run(preset_fast, tmp_path, "--train_flags=--lr=1.5")
    runs = [train_args.parse("", flags) for name, flags in preset_fast.commands if name == "train.py"]
    assert [(args.seed, args.max_step, args.tokens, args.lr, args.preset) for args in runs] == [
        (seed, 7, 900, 1.5, "fast") for seed in (0, 1, 0, 1)]
    assert all(str(args.seed) in Path(args.dataset).name for args in runs)
    assert len([name for name, _ in preset_fast.commands if name in ("permute.py", "generate_text.py")]) == 3
    before = len(preset_fast.commands)
    run(preset_fast, tmp_path, "--train_flags=--lr=1.5")
    assert len(preset_fast.commands) == before


def write_what_is_generated(preset_fast):
    """Each file of generated text has one document, which says what it goes on from."""
    make = preset_fast.script

    def script(name, *flags):
        make(name, *flags)
        if name == "generate_text.py":
            args = generate_text.parse_args([str(flag) for flag in flags])
            Path(args.out).rmdir()
            Path(args.out).write_text(json.dumps({"text": f"{args.tokens} after {args.after}"}) + "\n")
    preset_fast.script = script


def test_half_of_the_text_goes_on_from_passages(preset_fast, tmp_path):
    write_what_is_generated(preset_fast)
    run(preset_fast, tmp_path, "--orders given --after some/news.jsonl")
    runs = [train_args.parse("", flags) for name, flags in preset_fast.commands if name == "train.py"]
    assert [Path(args.out).name for args in runs] == ["given0-900-7+news", "given1-900-7+news"]
    assert all(list(documents(args.dataset)) == ["450 after None", "450 after some/news.jsonl"] for args in runs)


def test_learning_from_questions_too(preset_fast, tmp_path):
    """From the generated text and from all that the files have, in a run of its own name."""
    for name in ("facts", "riddles"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"context": "{name}", "choices": ["!", "?"], "gold": 0}}\n\n')
    write_what_is_generated(preset_fast)
    run(preset_fast, tmp_path, f"--orders given --questions {tmp_path}/facts.jsonl {tmp_path}/riddles.jsonl")
    runs = [train_args.parse("", flags) for name, flags in preset_fast.commands if name == "train.py"]
    assert [Path(args.out).name for args in runs] == ["given0-900-7+facts+riddles", "given1-900-7+facts+riddles"]
    for args in runs:
        found = list(documents(args.dataset))
        assert found == ["900 after None", "facts!", "riddles!"]
        assert args.tokens >= len("".join(found))


def test_a_run_that_was_interrupted_goes_on(preset_fast, tmp_path):
    run(preset_fast, tmp_path, "--orders given")
    folder = tmp_path / "out/given1-900-7"
    (folder / "run.json").write_text("{}")
    (tmp_path / "out/given1-900-7.seconds").unlink()
    resumed = []
    preset_fast.script = lambda *command: resumed.append(command)
    run(preset_fast, tmp_path, "--orders given")
    assert resumed == [("train.py", "--resume", folder)]


def test_without_the_model_it_says_how_to_make_it(preset_fast, tmp_path):
    preset_fast.MODEL = tmp_path / "none"
    with pytest.raises(preset_fast.UserError, match="make demo DEMO_FLAGS=--quick"):
        run(preset_fast, tmp_path)
