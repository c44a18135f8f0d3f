"""files/documents.py: every kind of source gives the same documents; what cannot be read is one
line."""

import gzip
import json

import data
from files.documents import are_questions, documents
from utils import UserError

import datasets
import pytest
import torch
from quizzes import write_lines
from words import read


@pytest.mark.parametrize(
    "kind",
    [
        "json",
        "jsonl.gz",
        "json.gz",
        "array.json",
        "parquet",
        "txt",
        "folder",
        "saved",
        "saved-splits",
        "column",
        "odd [name]*",
    ],
)
def test_every_kind_of_source_gives_the_same_minibatches(
    kind, tokenizers, corpus, tmp_path, capsys
):
    texts, path = read(corpus), tmp_path / f"corpus.{kind}"
    rows = datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))})
    if kind in ("json", "jsonl.gz", "json.gz"):
        opener = gzip.open if kind.endswith("gz") else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
    elif kind == "array.json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n \n\n".join(texts) + "\n")
    elif kind == "folder":
        path.mkdir()
        write_lines(path / "b.jsonl", [{"text": text} for text in texts[20:40]])
        write_lines(path / "a.json", [{"text": text} for text in texts[:20]])
        (path / "c.txt").write_text("\n\n".join(texts[40:]))
        (path / "README.md").write_text("not a document")
    elif kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved-splits":
        datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(path)
    else:  # any column of texts, any name; a note names it
        path = write_lines(
            tmp_path / f"{kind}.jsonl", [{"content": text, "n": 1} for text in texts]
        )
    assert list(documents(str(path))) == texts
    assert ("read from the column content" in capsys.readouterr().err) == (
        kind in ("column", "odd [name]*")
    )
    expected = data.minibatches(tokenizers["gpt2"], corpus, 32, 8, 64)
    assert torch.equal(data.minibatches(tokenizers["gpt2"], str(path), 32, 8, 64), expected)


def test_txt_documents_are_paragraphs(tmp_path):
    (tmp_path / "p.txt").write_text(
        "\ufeff\n\none\nstill one\n\n\n  \ntwo: é\n\t\nthree", encoding="utf-8"
    )
    assert list(documents(str(tmp_path / "p.txt"))) == ["one\nstill one", "two: é", "three"]


def test_missing_and_empty_texts_stay_documents(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text, "t": "y"} for text in ("x", None, "")])
    assert list(documents(path)) == ["x", "", ""]


def test_a_question_is_a_document_with_its_right_choice_or_with_every_one(tmp_path):
    """As evaluation judges it; beside ordinary documents, whose own fields are left alone."""
    question = {"context": "Bees make", "choices": [" honey", " wool"]}
    path = write_lines(
        tmp_path / "quiz.jsonl",
        [
            {**question, "gold": 1},
            question,
            {**question, "gold": None},
            {"text": "x", "context": "c", "choices": ["a"]},
        ],
    )
    assert list(documents(path)) == [
        "Bees make wool",
        *["Bees make honey", "Bees make wool"] * 2,
        "x",
    ]
    others = [
        write_lines(tmp_path / f"{number}.jsonl", rows)
        for number, rows in enumerate(([], [3], [{"text": "x"}]))
    ]
    assert are_questions(path) and not any(map(are_questions, others))


def test_questions_of_the_hub_are_documents_to_learn_from_and_to_calibrate_on(hub):
    hub.columns = {
        "context": ["Bees make", "Sheep give"],
        "choices": [[" honey", " wool"], [" wool", " milk"]],
        "gold": [0, 1],
    }
    asked = ["Bees make honey", "Sheep give milk"]
    assert list(documents("some/quiz")) == asked and are_questions("some/quiz")


# ---------------------------------------------------------------------------------- bad local input


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("two.jsonl", '{"a": "x", "b": "y"}', r"2 columns hold strings \(columns: a, b\), rename"),
        ("none.jsonl", '{"a": 1, "b": [2]}', "0 columns hold strings"),
        (
            "broken.jsonl",
            '{"text": "fine"}\n{"text": \n',
            "line 2: .* check that the file is intact",
        ),
        (
            "quiz.jsonl",
            '{"context": "Bees make", "choices": [" honey", " wool"], "gold": 2}',
            "cannot be read",
        ),
        ("broken.json.gz", "not gzip", "check that the file is intact"),
        ("broken.parquet", "not parquet", "check that the file is intact"),
        ("table.csv", "text\nx\n", "there is no file that ends with .jsonl"),
        ("absent", None, "no such file or folder"),
    ],
)
def test_bad_local_sources_are_one_line(name, content, message, tmp_path, capfd):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_documents(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "nothing").mkdir()
    for name, message in (
        ("splits", "train not found"),
        ("nothing", "there is no file that ends with .jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            list(documents(str(tmp_path / name)))


def test_a_missing_file_is_never_looked_up_on_the_hub(hub):
    for dataset in ["absent.parquet", "folder/absent.json.gz", "./absent", "/absent"]:
        with pytest.raises(UserError, match="no such file or folder"):
            next(documents(dataset))
    assert hub.asked == []
