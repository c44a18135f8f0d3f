"""utils.py: what a record says of the machine, how waiting is shown, and how OpenMP's threads
wait."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import utils
from models import machine
from models.loading import read_model

import pytest
import torch

ROOT = Path(__file__).parent.parent
# they compute nothing, or their parent has set it
PARENTS = ("authors_scripts", "demo", "record", "tables", "picture")
RUN = [
    file
    for folder in (".", "bench", "reproduce")
    for file in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in file.read_text() and file.stem not in PARENTS
]
SCRIPTS = [file for file in RUN if file.parent == ROOT]


@pytest.mark.parametrize(
    "given, added",
    [({}, {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}), ({"OMP_WAIT_POLICY": "ACTIVE"}, {})],
)
def test_threads_spin_shortly_unless_the_user_says_otherwise(monkeypatch, given, added):
    monkeypatch.setattr(os, "environ", {**given})
    utils.use_short_spins()
    assert os.environ == given | added


def test_an_interruption_is_a_line_even_while_libraries_are_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = "importing torch and transformers\ninterrupted\n"
    assert (done.stderr, done.returncode) == (said, -signal.SIGINT)  # 130 in a shell


@pytest.mark.parametrize("file", RUN, ids=lambda file: file.stem)
def test_a_script_begins_before_torch_is_imported(file):
    """OpenMP reads its settings when torch is loaded, and a wrong flag should not have to wait for
    that."""
    for node in ast.parse(file.read_text()).body:
        said = ast.unparse(node)
        if "begin_script(" in said or "use_short_spins()" in said or said == "import common":
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.names[0].name if isinstance(node, ast.Import) else node.module
            if module == "training":  # from training import defaults
                module = f"training.{node.names[0].name}"
            assert module.partition(".")[0] in (*sys.stdlib_module_names, "utils") or module in (
                "training.arguments",
                "training.defaults",
                "files.records",
            ), f"{file.name} imports {module} first"
    raise AssertionError(f"{file.name} never begins")


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_wrong_flag_is_refused_before_torch_is_imported(file, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemError('torch was imported')")
    done = subprocess.run(
        [sys.executable, file, "--modle", "x"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and re.fullmatch("error: .*(--modle|required).*\n", done.stderr), (
        done.stderr
    )


def test_an_import_changes_nothing_of_a_program():
    code = (
        "import os, sys, torch, transformers, accelerate\nbefore = sys.excepthook, "
        "dict(os.environ), list(sys.path)\nfrom masking.layers import apply_mask\nassert before "
        "== (sys.excepthook, dict(os.environ), list(sys.path))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_precisions(monkeypatch):
    """A CPU takes what it is fast at; a GPU float16, as the paper."""
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda found=has_bf16: found, raising=False)
        assert machine.fast_dtype("cpu") == dtype
    assert (
        read_model(str(ROOT / "reproduce/small_model"), None, "cuda", False)[0].dtype
        == torch.float16
    )


def test_a_full_memory_is_one_line(capsys):
    """A CPU's, too, which PyTorch has no class of error for, and while a model is read."""

    def read():
        with utils.as_user_error("--model large", "give another"):
            torch.empty(2**60, dtype=torch.int8)

    with pytest.raises(SystemExit) as stop:
        utils.run_script(read)
    assert stop.value.code == 2 and re.fullmatch(
        "error: out of memory .*; use a 16-bit .*\n", capsys.readouterr().err
    )
    for said, is_full in {
        "Triton Error: out of memory": True,
        "CUBLAS_STATUS_ALLOC_FAILED": True,
        "": False,
    }.items():
        assert utils.is_out_of_memory(RuntimeError(said)) == is_full


def test_peak_memory_is_that_of_the_gpus_or_where_none_is_used_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", [10, 0, 200].__getitem__)
    assert machine.peak_memory_bytes() == 210
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 0)
    assert machine.peak_memory_bytes() > 2**20
    monkeypatch.setattr(machine, "STATUS", Path("/dev/null"))
    assert machine.peak_memory_bytes() == 0


def test_progress_is_shown_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(utils, "LINE_S", 1e-9)
    for _ in utils.progress_bar(range(3), desc="reading", unit="document"):
        pass
    assert "reading: 100%" in capsys.readouterr().err
    monkeypatch.setattr(utils, "LINE_S", 3600)
    for _ in utils.progress_bar(range(3), desc="reading"):
        pass
    assert capsys.readouterr().err == ""
