"""evaluation/zero_shot.py: files are scored by the harness as by plain loops; what is refused; the
field's tasks."""

import json
import math
import statistics
import sys
from types import SimpleNamespace

from evaluation import zero_shot
from utils import UserError

import datasets
import pytest
import torch
from quizzes import hf_model, quiz, run, write_lines

# ------------------------------------------------------------------------------------------ scoring


def plain_score(model, tokenizer, context: str, choice: str, bos: bool = True) -> float:
    """log p(choice | context) by one forward a choice and the chain rule, in float64."""
    ids = tokenizer(context + choice, add_special_tokens=bos).input_ids
    shared = tokenizer(context.rstrip(" "), add_special_tokens=bos).input_ids
    if not shared:
        shared = [tokenizer.bos_token_id]
        ids = shared + ids
    start, ids = len(shared), torch.tensor(shared + ids[len(shared) :])
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0].double()
    return sum(
        float(logits[i - 1, ids[i]] - logits[i - 1].logsumexp(0)) for i in range(start, len(ids))
    )


@pytest.mark.parametrize("bos, are_spaced", [(True, False), (True, True), (False, True)])
def test_files_are_scored_by_the_chain_rule(loaded, tmp_path, bos, are_spaced):
    """acc_norm divides by the characters of a choice, without its leading space where all choices
    have one."""
    pytest.importorskip("lm_eval")
    model, tokenizer = loaded
    items = [
        item for item in quiz()[:12] if item["context"].strip() or (item["context"] == "" and bos)
    ]
    items = [item for item in items if item["choices"][0][0] == " "] if are_spaced else items
    items.append({"context": "every do", "choices": [" cat", " g follows the bird."], "gold": 1})
    hits = {"acc": [], "acc_norm": []}
    for item in items:
        scores = [
            plain_score(model, tokenizer, item["context"], choice, bos)
            for choice in item["choices"]
        ]
        for metric, length in (
            ("acc", lambda choice: 1),
            ("acc_norm", lambda choice: len(choice) - are_spaced),
        ):
            values = [score / length(choice) for score, choice in zip(scores, item["choices"])]
            hits[metric].append(values.index(max(values)) == item["gold"])
    task = zero_shot.load_file(write_lines(tmp_path / "quiz.jsonl", items))
    found = zero_shot.run_harness(model, tokenizer, {"quiz": task}, 5, bos=bos)["quiz"]
    for metric, expected in hits.items():
        assert found[metric] == pytest.approx(statistics.mean(expected))
        assert found[f"{metric}_stderr"] == pytest.approx(
            statistics.stdev(expected) / math.sqrt(len(items))
        )
    assert found["items"] == len(items) and found["source"].startswith("file ")
    few = zero_shot.run_harness(model, tokenizer, {"quiz": task}, 5, limit=1, bos=bos)["quiz"]
    assert (few["acc"], few["acc_stderr"], few["items"]) == (hits["acc"][0], None, 1)
    assert few["source"] != found["source"] and few["source"].endswith("no BOS") == (not bos)


def test_an_appended_end_of_text_token_is_not_scored(folder, tokenizers, tmp_path, monkeypatch):
    """Nor does it cost a choice its first token. The scores are compared: accuracies of a random
    model do not tell."""
    lm_eval = pytest.importorskip("lm_eval")
    # their vocabularies are of one size
    model, tokenizer = hf_model(folder / "gpt2")[0], tokenizers["ended"]
    told, evaluate = [], lm_eval.simple_evaluate
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda **names: told.append(evaluate(**names)) or told[-1]
    )
    items = [item for item in quiz() if item["context"].strip() and item["choices"][0][0] == " "][
        :6
    ]
    task = zero_shot.load_file(write_lines(tmp_path / "quiz.jsonl", items))
    zero_shot.run_harness(model, tokenizer, {"quiz": task}, 5)
    for sample, item in zip(told[0]["samples"]["quiz"], items, strict=True):
        plain = [
            plain_score(model, tokenizer, item["context"], choice, bos=False)
            for choice in item["choices"]
        ]
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize(
    "scale, choices, words",
    [
        (1, [" d", ""], "is not an item"),
        (1, [" bird" * 400, " fox"], "quiz: a choice has no token of its own, or more"),
        (math.nan, [" bird", " fox"], "not finite.*--dtype"),
    ],
)
def test_choices_that_cannot_be_scored(loaded, tmp_path, scale, choices, words):
    pytest.importorskip("lm_eval")
    model, tokenizer = loaded
    with torch.no_grad(), pytest.raises(UserError, match=words):
        path = write_lines(
            tmp_path / "quiz.jsonl", [{"context": "The old", "choices": choices, "gold": 1}]
        )
        weight = model.get_input_embeddings().weight
        before = weight.clone()
        try:
            weight.mul_(scale)
            zero_shot.run_harness(model, tokenizer, {"quiz": zero_shot.load_file(path)}, 4)
        finally:
            weight.copy_(before)


def test_a_tokenizer_without_a_token_that_begins_or_ends_a_text(folder, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(
        "eval.load_model", lambda *_: (None, SimpleNamespace(bos_token_id=None, eos_token_id=None))
    )
    with pytest.raises(UserError, match="no token that begins or ends a text"):
        run(f"--model {folder}/llama --task_file {folder}/quiz.jsonl")


# --------------------------------------------------------------------------------------- task files

GOOD = '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "{}",
        '{"context": "a", "choices": "bc", "gold": 0}',
        '{"context": "a", "choices": ["b", " "], "gold": 0}',
        '{"context": "\\ud800", "choices": ["b", "c"], "gold": 0}',
        '{"context": "a", "choices": ["b", "c"], "gold": 2}',
        '{"context": "a", "choices": ["b", "c"], "gold": true}',
    ],
)
def test_bad_lines(tmp_path, line):
    (tmp_path / "quiz.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(
        UserError,
        match=r"quiz.jsonl: line 3 is not an item: it needs a context, two or more choices",
    ):
        zero_shot.read_items(str(tmp_path / "quiz.jsonl"))


def test_good_files(tmp_path):
    """Line separators inside a string do not end the line; a mark in front, CRLF, no newline at the
    end do no harm."""
    first = GOOD.replace("sky", "sky\u2028\x0b").replace("\x0b", "\\u000b")
    (tmp_path / "quiz.jsonl").write_bytes(f"{first}\r\n{GOOD}".encode("utf-8-sig"))
    items = zero_shot.read_items(str(tmp_path / "quiz.jsonl"))
    assert [item["context"] for item in items] == ["The sky\u2028\x0b is", "The sky is"]


def test_two_tasks_of_one_name(folder, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="two tasks have one name"):
        run(
            f"--model {folder}/llama --task_file {folder}/quiz.jsonl "
            f"{write_lines(tmp_path / 'quiz.jsonl', quiz())}"
        )


# -------------------------------------------------------------------------- the harness's own tasks

HUB = {  # rows of the Hub's data sets for the field's seven tasks
    "Rowan/hellaswag": {
        "ctx_a": "A cat sits.",
        "ctx_b": "the cat",
        "activity_label": "Cats",
        "label": "1",
        "endings": ["hears a fox.", "follows the bird.", "is old.", "carries it."],
    },
    "EleutherAI/race": {
        "article": "The old cat watches the doctor.",
        "problems": str(
            [
                {
                    "question": "Who watches?",
                    "answer": "B",
                    "options": ["A fox.", "The cat.", "A bird.", "No one."],
                }
            ]
        ),
    },
    "baber/piqa": {
        "goal": "Hear the bird",
        "sol1": "Be quiet.",
        "sol2": "Follow the fox.",
        "label": 0,
    },
    "allenai/winogrande": {
        "sentence": "The dog follows the child because _ is small.",
        "option1": "the dog",
        "option2": "the child",
        "answer": "2",
    },
    "allenai/ai2_arc": {
        "question": "What hears?",
        "choices": {"text": ["a river", "a bird", "rain"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "allenai/openbookqa": {
        "question_stem": "After rain, the river is",
        "choices": {"text": ["bright", "heavy"], "label": ["A", "B"]},
        "answerKey": "B",
    },
}
SEVEN = "hellaswag,race, piqa, winogrande,arc_easy,arc_challenge,openbookqa"


def test_the_fields_seven_tasks(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")

    def load_dataset(path, *args, **kwargs):
        rows = datasets.Dataset.from_list([HUB[path]] * 3)
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run(
        f"--model {folder}/llama --ppl none --tasks '{SEVEN}' --task_limit 2 --save "
        f"{tmp_path}/seven.json"
    )
    record, said = json.loads((tmp_path / "seven.json").read_text()), capsys.readouterr().out
    assert list(record["tasks"]) == SEVEN.replace(" ", "").split(",") and record["task_limit"] == 2
    assert not any("no BOS" in task["source"] for task in record["tasks"].values())
    assert {name for name, task in record["tasks"].items() if "acc_norm" not in task} == {
        "race",
        "winogrande",
    }
    assert record["mean_acc"] == sum(task["acc"] for task in record["tasks"].values()) / 7
    assert f"mean acc {100 * record['mean_acc']:.2f} % (acc, not acc_norm; tasks: 7)" in said
    # a tag stands for its tasks
    assert list(zero_shot.load_harness(["ai2_arc"])) == ["arc_challenge", "arc_easy"]


def test_tasks_that_are_refused(folder, monkeypatch):
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="no such task"):
        run(f"--model {folder}/llama --tasks helaswag")

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r"piqa cannot be read.*no network.*--task_file"):
        run(f"--model {folder}/llama --tasks piqa")


def test_without_the_harness(folder, monkeypatch):
    zero_shot._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.manager", None)
    with pytest.raises(UserError, match=r"tasks need.*pip install 'lm_eval"):
        run(f"--model {folder}/llama --tasks piqa")
