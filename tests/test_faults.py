"""The campaigns of tests/faults in short: every reader against damaged and hostile files; the campaign itself."""
import ctypes
import io
import json
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

from utils import UserError

import numpy as np
import pytest
from faults import campaign, damage, fuzz, kill, readers


@pytest.mark.parametrize("make", readers.READERS, ids=lambda make: make.__name__)
def test_damaged_files_are_refused_or_read_right(make):
    with np.errstate(all="ignore"):
        rows, wrong = fuzz.campaign(25, 3, [make])
    assert not wrong, "\n".join(wrong)
    assert sum(rows[0][key] for key in ("refused", "right", "other")) == rows[0]["files"] >= 3
    if make is readers.mask_safetensors:
        assert rows[0]["other"] == 0 and rows[0]["refused"] == 25


# --------------------------------------------------------------------- the campaign notices what it is there to notice

def never_ends():
    while True:
        pass


@pytest.mark.parametrize("read, told", [
    (lambda path: path.parts[10**6], "IndexError"),
    (lambda path: sys.exit(3), "SystemExit"),
    (lambda path: ctypes.string_at(0), "SIGSEGV"),
    (lambda path: os.abort(), "SIGABRT"),
    (lambda path: os._exit(5), "exit code 5"),
    (lambda path: never_ends(), "processor time"),
    (lambda path: mmap.mmap(-1, 2**27).write(b"1" * 2**27) * 0, "more memory"),
    (lambda path: Path(path).read_text(), "reads"),
    (lambda path: raise_user_error("a line that does not say which file"), "names no file")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_reader_that_is_wrong_is_found_out(tmp_path, monkeypatch, read, told):
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.2 if told == "processor time" else 20)
    path = tmp_path / "file"
    path.write_text("good")
    reader = readers.Reader("a reader", [path], lambda: "good" if path.read_bytes() == b"good" else read(path),
                         (lambda raw, rng: b"bad",), None)
    counts, wrong = fuzz.read_damaged(reader, 2, 0, tmp_path / "kept")
    assert counts == {"refused": 0, "right": 0, "other": 0, "wrong": 2}
    assert told in wrong[0] and "file 0" in wrong[0] and "file 1" in wrong[1], wrong
    assert path.read_text() == "good" and len(os.listdir(tmp_path / "kept")) == 2


def raise_user_error(text):
    raise UserError(text)


def test_text_that_is_none_in_an_npz(tmp_path):
    """numpy makes a broken string of a number beyond the last character."""
    reader = readers.baseline_npz(tmp_path)
    members = damage._members(reader.files[0].read_bytes())
    broken = [(name, raw[:-4] + b"\x00\x00\x11\x00" if "depends_on" in name else raw) for name, raw in members]
    reader.files[0].write_bytes(damage._zipped(broken))
    with pytest.raises(UserError, match=r"not a baseline file .UnicodeDecodeError"):
        reader.read()


def test_sound_reads_and_refusals_are_no_faults(tmp_path):
    path = tmp_path / "file"
    path.write_text("good")

    def read():
        text = path.read_text()
        return raise_user_error(f"{path}: make it anew") if text == "refuse" else text
    damages = (lambda raw, rng: rng.choice((b"refuse", b"else", b"good")),)
    reader = readers.Reader("a reader", [path], read, damages, str.isalpha)
    counts, wrong = fuzz.read_damaged(reader, 120, 0)
    assert not wrong and min(counts["refused"], counts["right"], counts["other"]) > 20 and sum(counts.values()) == 120


def test_every_damage_damages():
    """Each changes a file it fits, within so many tries, and the same again for the same random state."""
    record = json.dumps({"a": [1, 2], "b": {"c": "d"}}).encode()
    archive = damage._zipped([("a.npy", fuzz_npy(3)), ("x/data.pkl", b"\x80\x02K\x01."), ("b.npy", fuzz_npy(5))])
    fits = {**dict.fromkeys(damage.BYTES, record), **dict.fromkeys(damage.JSON, record),
            **dict.fromkeys(damage.ZIP, archive), damage.other_pickle: archive,
            damage.edited_npy: damage._zipped([("a.npy", fuzz_npy(3))]),
            damage.other_text: damage.gzip.compress(record)}
    for change, raw in fits.items():
        found = [change(raw, random.Random(seed)) for seed in range(20)]
        assert sum(one != raw for one in found) >= 10, change
        assert found == [change(raw, random.Random(seed)) for seed in range(20)], change


def fuzz_npy(size):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(size, dtype=np.uint8))
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- the command

def test_both_campaigns_report_and_fail_together(tmp_path, monkeypatch, capsys):
    rows = [{"reader": "a", "files": 2, "wrong": 0}], [{"run": "b", "same": 1}]
    monkeypatch.setattr(campaign.fuzz, "run", lambda args: (rows[0], []))
    monkeypatch.setattr(campaign.kill, "run", lambda args: (rows[1], ["b: 1 of 2 runs are lost"]))
    assert campaign.main(["--json", str(tmp_path / "rows.json"), "--kills", "5", "--inputs", "7", "--seed", "3"]) == 1
    said = capsys.readouterr().out
    assert "| reader | files | wrong |\n| --- | --- | --- |\n| a | 2 | 0 |" in said and "| b | 1 |" in said
    assert "b: 1 of 2 runs are lost" in said
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [row.items() >= expected.items() for row, expected in zip(kept, rows[0] + rows[1])] == [True, True]
    assert all(row["seed"] == 3 and "torch" in row for row in kept)
    monkeypatch.setattr(campaign.kill, "run", lambda args: (rows[1], []))
    assert campaign.main([]) == 0


def test_the_campaigns_are_commands():
    for module, flags in ((fuzz, ["--readers", "npz"]), (kill, ["--kills", "5"])):
        args = module.parse_args([*flags, "--quick", "--seed", "7", "--json", "rows.json"])
        assert (args.quick, args.seed, args.json) == (True, 7, "rows.json")
    done = subprocess.run([sys.executable, campaign.__file__, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(flag in done.stdout for flag in ("--quick", "--inputs", "--kills")), done.stderr
