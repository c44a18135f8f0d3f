"""The flags that train.py and sparsify.py share (training/arguments.py): the folder that a run is
written to, and the settings of a run that goes on."""

import json

import sparsify
import train
from utils import UserError

import pytest


def parse(flags):
    return train.parse_args(flags.split())


def test_the_default_folder_says_what_a_run_is():
    """Model, pattern, method, and a hash that other settings change."""
    flags = [
        "--lr 5",
        "--lr 6",
        "--lr 5 --seed 1",
        "--lr 5 --estimator residual",
        "--lr 5 --sparsity_type 4:8",
    ]
    folders = [parse(f"{each} --model some/model").out for each in flags]
    assert [folder[:-7] for folder in folders] == [
        *["results/model_2of4_maskpro"] * 3,
        "results/model_2of4_residual",
        "results/model_4of8_maskpro",
    ]
    assert (
        len({folder[-7:] for folder in folders}) == 5
        and parse("--lr 5 --model some/model").out == folders[0]
    )
    assert parse("--out elsewhere").out == "elsewhere"


def test_sparsify_has_a_folder_and_a_budget():
    args = sparsify.parse_args(["--model", "some/model", "--sparsity_type", "4:8"])
    assert (args.out[:-7], args.minutes, args.steps, args.dtype) == (
        "results/model_4of8_sparsify",
        None,
        300,
        "auto",
    )
    assert sparsify.parse_args(["--model", "m", "--minutes", "7"]).steps is None


@pytest.mark.parametrize(
    "script, flags, other",
    [
        (parse, "--lr 3 --sparsity_type 4:8 --targets a b", "--seed 1"),
        (
            lambda flags: sparsify.parse_args(flags.split()),
            "--model m --steps 7 --dtype float32 --permute",
            "--minutes 5",
        ),
    ],
)
def test_a_run_goes_on_with_its_own_settings(tmp_path, script, flags, other):
    """Flags that say the same are let pass, flags that say otherwise are named."""
    before = script(flags)
    recorded = {
        name: value for name, value in vars(before).items() if name not in ("out", "resume")
    }
    (tmp_path / "run.json").write_text(json.dumps({"arguments": recorded}))
    for same in ("", flags, "--out elsewhere"):
        again = script(f"--resume {tmp_path} {same}")
        assert vars(again) == {**vars(before), "out": str(tmp_path), "resume": str(tmp_path)}
    assert script(f"--resume {tmp_path} --microbatch 7 --device cuda:1").microbatch == 7
    name, value = other.removeprefix("--").split()
    with pytest.raises(
        UserError, match=rf"differ: --{name} {recorded[name]} there, {float(value):g}.* here; leave"
    ):
        script(f"--resume {tmp_path} {flags.replace('--steps 7', '')} {other}")
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {**recorded, "looks": 7}}))
    with pytest.raises(UserError, match="a run of another version or script"):
        script(f"--resume {tmp_path}")
    (tmp_path / "run.json").write_text(
        json.dumps({"arguments": {**recorded, "trust_remote_code": True}})
    )
    with pytest.raises(UserError, match="add the flag if you still trust"):
        script(f"--resume {tmp_path}")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        script(f"--resume {tmp_path}")
