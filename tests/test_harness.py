"""eval.py --tasks: lm-evaluation-harness, whose scores are those of evaluation/zero_shot.py; what it refuses."""

import json
import sys

from evaluation import zero_shot
from utils import UserError

import datasets
import pytest
from quizzes import quiz, run, write_lines
from tiny import MODELS, POSITIONS


@pytest.fixture
def local_task(tmp_path, monkeypatch):
    """The quiz as a YAML task of the harness over a local file; its choices there have no leading space, the harness
    puts one between. Without the items whose contexts end in spaces."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    items = [item for item in quiz() if item["context"].strip() and item["choices"][0][0] == " "]
    write_lines(tmp_path / "own.jsonl", items)
    write_lines(tmp_path / "theirs.jsonl",
                [{**item, "choices": [choice[1:] for choice in item["choices"]]} for item in items])

    (tmp_path / "local.yaml").write_text(
        f"task: local_quiz\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/theirs.jsonl}}\n"
        "test_split: train\ndoc_to_text: context\noutput_type: multiple_choice\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n")
    return tmp_path / "local.yaml"


@pytest.mark.parametrize("flags", ["", "--tasks_no_bos --tasks_batchsize 3", "--task_limit 5"])
def test_files_score_as_in_the_harness(folder, tmp_path, local_task, flags):
    for name in MODELS:
        run(f"--model {folder}/{name} --ppl none --tasks {local_task} --task_file {tmp_path}/own.jsonl {flags} "
              f"--save {tmp_path}/{name}.json")
        record = json.loads((tmp_path / f"{name}.json").read_text())
        own, theirs = record["tasks"]["own"], record["tasks"]["local_quiz"]
        assert own.pop("source").startswith("file ") and theirs.pop("source").startswith("lm_eval 0.")
        assert own == pytest.approx(theirs)
        assert own["items"] == (5 if "limit" in flags else 13)
        assert record["mean_acc"] == pytest.approx(own["acc"])


@pytest.mark.parametrize("bos", [True, False])
def test_every_score_is_the_harness_one(loaded, bos):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = loaded
    pairs = [(item["context"], choice) for item in quiz() for choice in item["choices"] if item["context"].strip()]
    # a dog is another token than do
    pairs += [("", "the old cat"), ("The old cat " * 60, " watches the doctor."), ("every do", "g follows the bird.")]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=None if bos else False)
    theirs = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    requests = [zero_shot.encode(tokenizer, *pair, bos) for pair in pairs]
    requests = [(ids[-POSITIONS - 1:], start - max(0, len(ids) - POSITIONS - 1)) for ids, start in requests]
    assert zero_shot.log_likelihoods(model, requests, 4) == pytest.approx([score for score, _ in theirs], abs=1e-4)


HUB = {  # rows of the Hub's data sets for the field's seven tasks
    "Rowan/hellaswag": {"ctx_a": "A cat sits.", "ctx_b": "the cat", "activity_label": "Cats", "label": "1",
                        "endings": ["hears a fox.", "follows the bird.", "is old.", "carries it."]},
    "EleutherAI/race": {"article": "The old cat watches the doctor.", "problems": str(
        [{"question": "Who watches?", "answer": "B", "options": ["A fox.", "The cat.", "A bird.", "No one."]}])},
    "baber/piqa": {"goal": "Hear the bird", "sol1": "Be quiet.", "sol2": "Follow the fox.", "label": 0},
    "allenai/winogrande": {"sentence": "The dog follows the child because _ is small.", "option1": "the dog",
                           "option2": "the child", "answer": "2"},
    "allenai/ai2_arc": {"question": "What hears?", "choices": {"text": ["a river", "a bird", "rain"],
                                                               "label": ["A", "B", "C"]}, "answerKey": "B"},
    "allenai/openbookqa": {"question_stem": "After rain, the river is", "choices": {"text": ["bright", "heavy"],
                                                                                    "label": ["A", "B"]},
                           "answerKey": "B"}}
SEVEN = "hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa"


def test_the_fields_seven_tasks(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")

    def load_dataset(path, *args, **kwargs):
        rows = datasets.Dataset.from_list([HUB[path]] * 3)
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run(f"--model {folder}/llama --ppl none --tasks {SEVEN} --task_limit 2 --save {tmp_path}/seven.json")
    record, said = json.loads((tmp_path / "seven.json").read_text()), capsys.readouterr().out
    assert list(record["tasks"]) == SEVEN.split(",") and record["task_limit"] == 2
    assert {name for name, task in record["tasks"].items() if "acc_norm" not in task} == {"race", "winogrande"}
    assert record["mean_acc"] == sum(task["acc"] for task in record["tasks"].values()) / 7
    assert f"mean acc {100 * record['mean_acc']:.2f} % (acc, not acc_norm; tasks: 7)" in said
    assert list(zero_shot.load_harness(["ai2_arc"])) == ["arc_challenge", "arc_easy"]  # a tag stands for its tasks


def test_tasks_that_are_refused(folder, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such task"):
        run(f"--model {folder}/llama --tasks helaswag")

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r"piqa cannot be loaded.*no network.*--task_file"):
        run(f"--model {folder}/llama --tasks piqa")


def test_without_the_harness(folder, monkeypatch):
    zero_shot._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.manager", None)
    with pytest.raises(UserError, match=r"--tasks needs.*pip install 'lm_eval"):
        run(f"--model {folder}/llama --tasks piqa")
