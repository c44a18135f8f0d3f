"""What TensorBoard and Weights & Biases are told (training/tracking.py), by stand-ins for both."""
import sys
from types import ModuleType, SimpleNamespace

from utils import UserError

import pytest
from runs import GRADIENTS, column

import train
from training.run_folder import RunFolder


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for both libraries, which note what they are told."""
    told = SimpleNamespace(scalars=[], text=[], logs=[], init=None, closed=[])

    class SummaryWriter:
        def __init__(self, folder, **settings):
            told.folder = folder

        def add_text(self, tag, text):
            told.text.append((tag, text))

        def add_scalar(self, name, value, step):
            told.scalars.append((step, name, value))

        def close(self):
            told.closed.append("tensorboard")

    def init(**kwargs):
        told.init = kwargs
        return SimpleNamespace(log=lambda values, step: told.logs.append((step, values)),
                               finish=lambda: told.closed.append("wandb"))
    for name, content in (("tensorboard", {}), ("torch.utils.tensorboard", {"SummaryWriter": SummaryWriter}),
                          ("wandb", {"init": init})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_only_the_main_process_has_trackers():
    folder = SimpleNamespace(group=SimpleNamespace(is_main=False), trackers=[])
    RunFolder.start_trackers(folder, [pytest.fail], 0)
    assert folder.trackers == []


def test_both_trackers_are_told_every_step(learn, trackers):
    run = learn(f"{GRADIENTS} --targets k_proj --val_fraction 0.2 --num_evals 2 --tensorboard --wandb")
    assert trackers.folder == str(run.folder / "tensorboard") and trackers.closed == ["tensorboard", "wandb"]
    assert trackers.init["project"] == "maskpro" and trackers.init["config"]["lr"] == 0.3
    assert "lr: 0.3" in trackers.text[0][1]
    assert [number for number, _ in trackers.logs] == column(run, "step") == [1, 2, 3, 4]
    for line, (number, values) in zip(run.metrics, trackers.logs):
        expected = {key: line[key] for key in ("loss", "seconds", "heldout", "blocks_not_finite") if key in line}
        for layers in (layers for layers in run.layers if layers["step"] == number):
            expected |= {key: pytest.approx(sum(layers[key].values()) / 2) for key in ("changed", "entropy")}
        assert values == expected
    assert trackers.scalars == [(number, *item) for number, values in trackers.logs for item in values.items()]
    assert sum("heldout" in values for _, values in trackers.logs) == 2


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_runs(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)  # import fails
    with pytest.raises(UserError, match=f"{library} is missing; install it with: pip install {library}"):
        train.main(f"--model nowhere --{library} --out never".split())
