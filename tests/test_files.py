"""Files are written whole or not at all, and what a killed process left behind goes with the next
write."""

import errno
import os
import signal
from pathlib import Path

from files import records
from files.atomic import atomic_write
from training import log
from utils import UserError

import pytest
from runs import raises
from safetensors import SafetensorError


def write(path, text="new"):
    with atomic_write(path) as tmp:
        tmp.write_text(text)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write(path, "old")
    write(path)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        ValueError("mine"),
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
    ],
)
def test_a_block_that_fails_changes_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    told = UserError if isinstance(error, (OSError, SafetensorError)) else type(error)
    with pytest.raises(told) as raised, atomic_write(path) as tmp:
        tmp.mkdir()
        (tmp / "half").write_text("half")
        raise error
    if told is UserError:
        assert "No space left" in str(raised.value) and "free some space" in str(raised.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_its_name_with_all_its_files_readable(tmp_path):
    with atomic_write(tmp_path / "folder") as tmp:
        (tmp / "in").mkdir(parents=True)
        (tmp / "in" / "file").touch(mode=0o600)
    assert os.listdir(tmp_path) == ["folder"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "folder" / "in" / "file").stat().st_mode == (
        tmp_path / "plain"
    ).stat().st_mode


def test_everything_is_synced_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    events, path, fsync, replace = [], tmp_path / "folder", os.fsync, os.replace

    def record_sync(handle):
        events.append(
            os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else "?"
        )
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(
        os, "replace", lambda source, target: (events.append("rename"), replace(source, target))
    )
    with atomic_write(path) as tmp:
        tmp.mkdir()
        (tmp / "a").touch()
    if "?" in events:
        pytest.skip("needs /proc")
    assert events == [f"{tmp}/a", str(tmp), "rename", str(tmp_path)]


def test_mounts_without_permissions_or_syncing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "chmod", raises(PermissionError(errno.EPERM, "not permitted")))
    monkeypatch.setattr(os, "fsync", raises(OSError(errno.EINVAL, "Invalid argument")))
    write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    if not (child := os.fork()):
        try:
            with atomic_write(path) as tmp:
                tmp.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    write(tmp_path / "other")
    assert path.read_text() == "old" and len(os.listdir(tmp_path)) == 3
    write(path)
    assert path.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["file", "other"]


# ------------------------------------------------------------------------------------------ records


def test_the_model_that_a_folder_was_pruned_from(tmp_path):
    assert records.base_model("some/model") == "some/model"
    assert records.base_model(str(tmp_path)) == str(tmp_path)
    for damaged in ("[]", '{"arguments": []}', "{}"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(
            UserError, match=r"run\.json cannot be read \(ValueError: it has no arguments\)"
        ):
            records.read_record(tmp_path)
    records.write_json(tmp_path / "prune.json", {"arguments": {"model": "some/model"}})
    assert records.base_model(str(tmp_path)) == "some/model"


def test_lines_are_read_up_to_a_torn_one_and_cut_to_what_a_state_knows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert records.read_lines(path) == [{"step": 1}, {"step": 2}]
    assert records.read_lines(path, 24) == [{"step": 1}, {"step": 2}]
    cut = log.Log(tmp_path, 12)
    assert cut.lines == [{"step": 1}] and path.read_text() == '{"step": 1}\n' and cut.sync() == 12
    with pytest.raises(
        UserError, match=r"metrics.jsonl cannot be read .*lines are missing.*; .* restore it"
    ):
        records.read_lines(path, 24)
    path.write_text('{"step": 1}\n[\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read .*; give run folders"):
        records.read_lines(path)
    assert log.Log(tmp_path).lines == [] and path.read_text() == ""
