"""evaluate.py --compare: the table that evaluations make."""

import json

from utils import UserError

import pytest
import transformers
from quizzes import run, table_of
from tiny import MODELS

from evaluation.comparison import percent


def record(**changes) -> dict:
    return {"model": "m", "mask": None, "sparsity_type": None, "density": 1.0, **changes}


def text(ppl: float, **changes) -> dict:
    return {"ppl": ppl, "text": "some/text.txt", "seqlen": 512, "windows": 32, "fingerprint": "aa", **changes}


def task(acc: float, **changes) -> dict:
    return {"acc": acc, "acc_stderr": 0.01, "items": 100, "source": "lm_eval 0.4.13", **changes}


def test_compare(tmp_path, monkeypatch, capsys, nothing_loads):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").mkdir()
    quiz = task(0.5, acc_norm=0.75, acc_norm_stderr=None, source="file ab")
    (tmp_path / "dense/evaluation.json").write_text(json.dumps(record(
        **text(5.12, text="elsewhere/text.txt"), tasks={"piqa": task(0.78), "quiz": quiz}, mean_acc=0.64)))
    (tmp_path / "mask.evaluation.json").write_text(json.dumps(record(
        **text(6.7891), sparsity_type="2:4", density=0.5, tasks={"quiz": quiz, "piqa": task(0.7)}, mean_acc=0.6)))
    run("--compare dense mask.evaluation.json")
    said = capsys.readouterr().out
    assert table_of(said) == [
        ["model", "sparsity", "density", "perplexity, text.txt, 32 windows of 512 tokens", "piqa acc (%, 100 items)",
         "quiz acc (%, 100 items)", "quiz acc_norm (%, 100 items)", "mean acc (%, 2 tasks)"], ["---"] * 8,
        ["dense", "", "1.000000", "5.120", "78.00 ± 1.00", "50.00 ± 1.00", "75.00", "64.00"],
        ["mask", "2:4", "0.500000", "6.789", "70.00 ± 1.00", "50.00 ± 1.00", "75.00", "60.00"]]
    assert said.rstrip().endswith("|")  # nothing to warn of


@pytest.mark.parametrize("other, headings", [
    (text(7, seqlen=1024), ["text.txt, 32 windows of 512 tokens", "text.txt, 32 windows of 1024 tokens"]),
    (text(7, text="c4"), ["text.txt, 32 windows of 512 tokens", "c4, 32 windows of 512 tokens"]),
    (text(7, windows=9), ["text.txt, 32 windows of 512 tokens", "text.txt, 9 windows of 512 tokens"]),
    (text(7, fingerprint="bb"), [f"text.txt, 32 windows of 512 tokens [{i}]" for i in (1, 2)])])
def test_other_texts_have_other_columns(tmp_path, capsys, other, headings):
    for name, numbers in (("a", text(5)), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(**numbers)))
    run(f"--compare {tmp_path}/a.json {tmp_path}/b.json")
    said = capsys.readouterr().out
    head, _, *rows = table_of(said)
    assert head[3:] == [f"perplexity, {heading}" for heading in headings]
    assert [row[3:] for row in rows] == [["5.000", ""], ["", "7.000"]]
    assert "numbers compare within a column only" in said


@pytest.mark.parametrize("other", [task(0.4, items=50), task(0.4, source="lm_eval 0.4.12"),
                                   task(0.4, source="lm_eval 0.4.13, no BOS")])
def test_other_items_have_other_columns(tmp_path, capsys, other):
    for name, numbers in (("a", task(0.3)), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(tasks={"piqa": numbers, "race": task(0.5)},
                                                                   mean_acc=0.45)))
    run(f"--compare {tmp_path}/a.json {tmp_path}/b.json")
    head, _, *rows = table_of(capsys.readouterr().out)
    assert len(set(head)) == len(head)  # piqa, race, piqa of the other, mean acc of each
    assert [row[3:] for row in rows] == [["30.00 ± 1.00", "50.00 ± 1.00", "", "45.00", ""],
                                         ["", "50.00 ± 1.00", "40.00 ± 1.00", "", "45.00"]]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"density": 1.0}',
                                     '{"density": 1.0, "sparsity_type": null, "tasks": [1]}'])
def test_no_records(tmp_path, content):
    if content:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"--compare .*evaluation.json is no record of evaluate.py.*make it with"):
        run(f"--compare {tmp_path}")


def test_what_is_written_can_be_compared(folder, tmp_path, capsys):
    for name in MODELS:
        run(f"--model {folder}/{name} --ppl {folder}/text.txt --seqlen 64 --nwindows 2 --task_limit 8 "
              f"--task_file {folder}/quiz.jsonl --save {tmp_path}/{name}.json")
    capsys.readouterr()
    run("--compare " + " ".join(f"{tmp_path}/{name}.json" for name in MODELS))
    head, _, *rows = table_of(capsys.readouterr().out)
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in MODELS]
    assert head[3:] == [*(f"perplexity, text.txt, 2 windows of 64 tokens [{i}]" for i in (1, 2, 3)),  # three tokenizers
                        "quiz acc (%, 8 items)", "quiz acc_norm (%, 8 items)"]
    for i, (row, numbers) in enumerate(zip(rows, records)):
        assert row[3 + i] == f"{numbers['ppl']:.3f}"
        assert row[-2] == percent(numbers["tasks"]["quiz"], "acc")
    assert records[0]["environment"]["transformers"] == transformers.__version__
