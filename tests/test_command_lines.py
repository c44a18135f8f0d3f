"""What the scripts' command lines mean: the authors' commands, and --help."""

import argparse
from pathlib import Path

from models.machine import environment
from utils import VERSION

import pytest
from runs import SCRIPTS


def parse(command: str) -> argparse.Namespace:
    _, script, *arguments = command.split()
    return SCRIPTS[script.removesuffix(".py")].parse_args(arguments)


def test_the_authors_commands_parse_to_the_papers_settings():
    of_mask = parse("python get_mask.py")
    of_loss = parse("python inference_loss.py --dataset_size 512 --batchsize 32")
    of_train = parse(
        "python train.py --dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625"
    )
    assert of_mask.sparsity_type == of_train.sparsity_type == (2, 4)
    # one command's output is the next one's input
    assert of_mask.save == of_loss.mask == of_train.mask
    assert of_mask.model == parse("python prune.py").save_model
    for args in (of_loss, of_train):
        assert (args.model, args.dataset) == ("meta-llama/Llama-2-7b-hf", "allenai/c4")
        assert (args.dataset_size, args.batchsize, args.seqlen) == (512, 32, 128)
        assert (args.dtype, args.device) == (None, None)
    assert (of_train.lr, of_train.logits, of_train.epoch, of_train.alpha) == (50, 10, 625, 0.99)
    assert (of_train.estimator, of_train.space, of_train.init) == ("maskpro", "linear", "mask")
    assert (of_train.baseline, of_train.targets) == ("cached", None)
    assert not (of_train.save or of_train.debias_tracker or of_train.seed)
    steps = of_train.epoch * of_train.dataset_size // of_train.batchsize
    assert min(of_train.max_step, steps) == steps == 10000
    assert vars(parse("python train.py --sqlen 64")) == vars(
        parse("python train.py --lr 50 --epoch 10000 --seqlen 64")
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(name, monkeypatch, capsys):
    script, parsers, parse_args = SCRIPTS[name], [], argparse.ArgumentParser.parse_known_args

    def noting(parser, *arguments):
        parsers.append(parser)
        return parse_args(parser, *arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", noting)
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__.splitlines()[0] in said
    for action in parsers[0]._actions:
        name = (action.option_strings or [action.metavar or action.dest])[-1]
        assert action.help and len(action.help) > 10 and name in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_there_is_one_version(name, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(["--version"])
    assert (
        capsys.readouterr().out == f"MaskPro {VERSION}\n"
        and environment("cpu")["version"] == VERSION
    )
    assert f"\nversion: {VERSION}\n" in (Path(__file__).parent.parent / "CITATION.cff").read_text()
