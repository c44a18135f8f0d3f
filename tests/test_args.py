"""The flags of train.py (training/args.py): the preset, the names of old, the folder that a run is written to."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import train
from training import args as train_args
from training import baselines

ROOT = Path(__file__).resolve().parent.parent


def parse(flags):
    return train_args.parse(train.__doc__, flags.split())


def test_the_preset_is_its_flags():
    spelled = " ".join(f"--{key}" if value is True else f"--{key} {value}"
                       for key, value in train_args.PRESETS["fast"].items())
    plain, preset = parse(spelled), parse("--preset fast")
    assert vars(preset) == {**vars(plain), "preset": "fast", "out": preset.out}
    assert parse("--lr 3 --preset fast --batchsize 5").lr == 3
    assert parse("--lr 3 --preset fast --batchsize 5").batchsize == 5
    documents = parse("--preset fast --dataset_size 64")
    assert documents.tokens is None and documents.dataset_size == 64  # a flag of the user's is not passed over
    assert parse("--preset fast").curvature and not parse("--preset fast --no-curvature").curvature
    both = parse("--preset fast --dataset_size 64 --tokens 900")
    assert both.tokens == 900


def test_the_old_names_of_flags(tmp_path, capsys):
    """--looks and --init exchange, as they were called, mean the same, are not in the manual and may be in a record."""
    new = parse("--num_evals 7 --init swaps")
    assert vars(parse("--looks 7 --init exchange")) == vars(new) and (new.num_evals, new.init) == (7, "swaps")
    assert parse("--preset fast").init == "swaps" and parse("").num_evals == 20
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert "--num_evals" in said and "swaps" in said and "looks" not in said and "exchange" not in said
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"looks": 7, "init": "exchange", "lr": 3.0}}))
    again = parse(f"--repeat {tmp_path}")
    assert (again.num_evals, again.init, again.lr) == (7, "swaps", 3)


@pytest.mark.parametrize("flags, curvature", [("", True), ("--no-curvature", False)])
def test_a_record_names_what_the_preset_does_not_decide(tmp_path, flags, curvature):
    recorded = vars(parse(f"--preset fast {flags}"))
    older = {name: value for name, value in recorded.items() if name != "curvature"}
    for arguments, expected in ((recorded, curvature), (older, False)):
        (tmp_path / "run.json").write_text(json.dumps({"arguments": arguments}))
        again = parse(f"--repeat {tmp_path}")
        assert again.curvature is expected and again.preset == "fast"  # a run of before there was the flag has none


@pytest.mark.parametrize("flags, name", [
    ("--dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625", "lr50_epoch625_logits10_size512"),
    ("--estimator maskpro", "lr50_epoch10000_logits10_size512"),
    ("--estimator residual --lr 0.5 --dataset_size 64", "residual_lr0.5_epoch10000_logits10_size64"),
    ("--estimator running --tokens 4096", "running_lr50_epoch10000_logits10_tokens4096"),
    ("--estimator straight_through --epoch 2", "straight_through_lr50_epoch2_logits10_size512"),
    ("--preset fast", "fast_lr0.8_epoch1_logits4_tokens400000"),
    ("--preset fast --dataset_size 64 --lr 2", "fast_lr2_epoch1_logits4_size64")])
def test_the_default_folder_says_what_a_run_is(flags, name):
    args = parse(flags)
    assert args.out == train_args.default_folder(args) == f"results/{name}"
    assert parse(f"{flags} --out elsewhere").out == "elsewhere"


@pytest.mark.parametrize("name", ["inference_loss_512_bs32_sql128.npz", "inference_loss_8_bs4_sql32.npz"])
def test_git_ignores_the_baselines_of_the_default_names(name):
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if not shutil.which("git") or git("rev-parse", "--show-toplevel").stdout.strip() != str(ROOT):
        pytest.skip("not a git checkout")
    size, batchsize, sqlen = map(int, re.findall(r"\d+", name))
    assert baselines.default_path(size, batchsize, sqlen) == name
    assert git("check-ignore", name).stdout.strip() == name
