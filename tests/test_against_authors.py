"""reproduce/against_authors.py, on the authors' scripts where MASKPRO_AUTHORS names a clone of them."""
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from utils import run_script

import pytest
from tiny import write_corpus

SCRIPT = Path(__file__).parent.parent / "reproduce/against_authors.py"
AUTHORS = os.environ.get("MASKPRO_AUTHORS")


def compare(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, check=False)


def test_without_a_clone_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: import_module(SCRIPT.stem).main(["--authors", str(tmp_path)]))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith(f"error: {tmp_path}/train.py is missing; clone ") and err.count("\n") == 1


@pytest.mark.skipif(not AUTHORS, reason="MASKPRO_AUTHORS names no clone of github.com/woodenchild95/Maskpro")
def test_the_authors_scripts_give_the_same(models, tmp_path):
    """Masks, baselines and scores; four steps are too few for the losses to say much."""
    text, record = write_corpus(tmp_path / "text.jsonl", 32), tmp_path / "record.json"
    done = compare("--authors", AUTHORS, "--model", models["llama"], "--dataset", text, "--dataset_size", 32,
                   "--seqlen", 32, "--epoch", 4, "--seeds", 2, "--record", record)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(record.read_text())
    verdicts = {row["what"].split()[0].strip(":,"): row["verdict"] for row in found["table"]}
    assert verdicts["mask"] == verdicts["baseline"] == verdicts["score"] == "same" and "loss" in verdicts
    assert found["table"][1]["theirs"] == found["table"][1]["ours"] and len(found["sha256"]["model"]) == 64
    curves = found["curves"]
    assert len(curves["theirs"]) == len(curves["ours"]) == curves["last step"][-1] == 4
    assert curves["theirs"][0] == pytest.approx(curves["ours"][0], abs=1e-4)  # of m0
