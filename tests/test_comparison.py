"""eval.py --compare: the table of several evaluations."""

import json

from evaluation.comparison import comparison, percent

import pytest
from quizzes import run, table_of
from tiny import MODELS


def record(**numbers) -> dict:
    return {"sparsity_type": None, "density": 1.0, "dtype": "float32", **numbers}


def text(ppl: float, **changes) -> dict:
    return record(
        **{
            "ppl": ppl,
            "text": "some/text.txt",
            "seqlen": 512,
            "windows": 32,
            "fingerprint": "aa",
            **changes,
        }
    )


def task(acc: float, **changes) -> dict:
    return {"acc": acc, "acc_stderr": 0.01, "items": 100, "source": "lm_eval 0.4.13", **changes}


def test_compare(tmp_path, monkeypatch, capsys, nothing_loads):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    quiz = task(0.5, acc_norm=0.75, acc_norm_stderr=None, source="file ab")
    (tmp_path / "dense.json").write_text(
        json.dumps(
            text(
                5.12,
                text="elsewhere/text.txt",
                tasks={"piqa": task(0.78), "quiz": quiz},
                mean_acc=0.64,
            )
        )
    )
    (tmp_path / "more/a|b.json").write_text(
        json.dumps(
            text(
                6.7891,
                sparsity_type="2:4",
                density=0.5,
                tasks={"quiz": quiz, "piqa": task(0.7)},
                mean_acc=0.6,
            )
        )
    )
    run("--compare dense.json more")
    said = capsys.readouterr().out
    assert table_of(said) == [
        [
            "model",
            "sparsity",
            "density",
            "perplexity, text.txt, 32 windows of 512 tokens, float32",
            "piqa acc (%, 100 items, float32)",
            "quiz acc (%, 100 items, float32)",
            "quiz acc_norm (%, 100 items, float32)",
            "mean acc (%, 2 tasks, float32)",
        ],
        ["---"] * 8,
        ["dense", "", "1.000000", "5.120", "78.00 ± 1.00", "50.00 ± 1.00", "75.00", "64.00"],
        ["more/a/b", "2:4", "0.500000", "6.789", "70.00 ± 1.00", "50.00 ± 1.00", "75.00", "60.00"],
    ]
    assert said.rstrip().endswith("|")  # nothing to warn of


@pytest.mark.parametrize(
    "change, heading",
    [
        ({"seqlen": 1024}, "text.txt, 32 windows of 1024 tokens, float32"),
        ({"text": "c4"}, "c4, 32 windows of 512 tokens, float32"),
        ({"dtype": "bfloat16"}, "text.txt, 32 windows of 512 tokens, bfloat16"),
        ({"windows": 9}, "text.txt, 9 windows of 512 tokens, float32"),
        ({"fingerprint": "bb"}, "text.txt, 32 windows of 512 tokens, float32"),
        ({"bos": True}, "text.txt, 32 windows of 512 tokens after BOS, float32"),
    ],
)
def test_other_texts_have_other_columns(change, heading):
    table = comparison([("a", text(5)), ("b", text(7, **change))])
    head, _, *rows = table_of(table)
    assert head[3:] == [
        "perplexity, text.txt, 32 windows of 512 tokens, float32",
        f"perplexity, {heading}",
    ]
    assert [row[3:] for row in rows] == [["5.000", ""], ["", "7.000"]]
    assert "Compare numbers within a column only" in table


@pytest.mark.parametrize(
    "change", [{"items": 50}, {"source": "lm_eval 0.4.12"}, {"source": "lm_eval 0.4.13, no BOS"}]
)
def test_other_items_have_other_columns(change):
    """The columns are piqa, race, the other's piqa, and the mean acc of each."""
    rows = table_of(
        comparison(
            [
                (name, record(tasks={"piqa": numbers, "race": task(0.5)}, mean_acc=0.45))
                for name, numbers in (("a", task(0.3)), ("b", task(0.4, **change)))
            ]
        )
    )[2:]
    assert [row[3:] for row in rows] == [
        ["30.00 ± 1.00", "50.00 ± 1.00", "", "45.00", ""],
        ["", "50.00 ± 1.00", "40.00 ± 1.00", "", "45.00"],
    ]


def test_what_is_written_can_be_compared(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    for name in MODELS:
        run(
            f"--model {folder}/{name} --ppl {folder}/text.txt --seqlen 64 --nwindows 2 "
            f"--task_limit 8 --task_file {folder}/quiz.jsonl --save {tmp_path}/{name}.json"
        )
    capsys.readouterr()
    run("--compare " + " ".join(f"{tmp_path}/{name}.json" for name in MODELS))
    head, _, *rows = table_of(capsys.readouterr().out)
    text = "perplexity, text.txt, 2 windows of 64 tokens, float32"
    assert head[3:] == [text] * 3 + [  # three tokenizers, three columns
        "quiz acc (%, 8 items, float32)",
        "quiz acc_norm (%, 8 items, float32)",
    ]
    for i, (name, row) in enumerate(zip(MODELS, rows)):
        numbers = json.loads((tmp_path / f"{name}.json").read_text())
        assert (row[3 + i], row[-2]) == (
            f"{numbers['ppl']:.3f}",
            percent(numbers["tasks"]["quiz"], "acc"),
        )
