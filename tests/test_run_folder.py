"""A run's folder (training/run_folder.py): one run at a time, and disks that are full."""

import errno
import shlex

import sparsify
import train
from training import checkpoint, log, run_folder
from utils import UserError

import pytest
from faults import kill
from runs import VANILLA, arguments, raises, states_of


def test_the_second_run_in_a_folder_is_refused(workshop, stopped):
    with pytest.raises(
        UserError,
        match=r"exists already; resume it: python train.py --resume .*or choose another",
    ):
        train.main(arguments(workshop, stopped, VANILLA))
    # other settings
    with pytest.raises(UserError, match=r"run exists already; choose another --out or remove it$"):
        train.main(arguments(workshop, stopped))
    with (
        run_folder.lock(stopped),
        pytest.raises(UserError, match="is being written by another run; wait until it ends"),
    ):
        train.main(["--resume", str(stopped)])
    with pytest.raises(UserError, match=rf"resume it with `python train.py --resume {stopped}`"):
        sparsify.main(["--resume", str(stopped)])
    (stopped / "lock").write_text("of a process that is no more")
    train.main(["--resume", str(stopped)])


def test_the_command_that_goes_on_survives_a_shell():
    folder = run_folder.RunFolder("my runs/a;b", {"checkpoint_every": "10m"}, "train.py")
    assert shlex.split(folder.resume_command) == ["python", "train.py", "--resume", "my runs/a;b"]


def test_a_run_that_fails_before_its_first_step_leaves_nothing(workshop, tmp_path, losses):
    losses[1] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(workshop, tmp_path / "run", VANILLA))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["state", "metrics"])
def test_a_disk_that_fills_up_costs_no_more_than_the_time_since_the_last_state(
    workshop, tmp_path, monkeypatch, place
):
    full = OSError(errno.ENOSPC, "No space left on device")
    save, write = checkpoint.save, log.Log.write

    def failing_save(path, scalars, tensors):
        if "step00000003" in path.name:
            raise UserError(f"{path} cannot be written ({full}); free some space") from full
        save(path, scalars, tensors)

    def failing_write(self, line):
        if line["step"] == 3:
            raise full
        write(self, line)

    with monkeypatch.context() as patch:
        if place == "state":
            patch.setattr(checkpoint, "save", failing_save)
        else:
            patch.setattr(log.Log, "write", failing_write)
        with pytest.raises(
            UserError,
            match=r"cannot be written.*No space left.*resume with: python train.py --resume",
        ):
            train.main(arguments(workshop, tmp_path / "run"))
    assert states_of(tmp_path / "run") == ["step00000001.pt", "step00000002.pt"]
    train.main(["--resume", str(tmp_path / "run")])
    train.main(arguments(workshop, tmp_path / "whole/run"))
    assert kill.contents(tmp_path / "run") == kill.contents(tmp_path / "whole/run")
