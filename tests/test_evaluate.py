"""evaluate.py and evaluation/: zero-shot scores against plain loops and against lm-evaluation-harness itself, what is
verified and refused, where the numbers go, and the table they make."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

from utils import UserError

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import MODELS, POSITIONS, training_text

import data
import evaluate
from evaluation import zero_shot
from evaluation.comparison import percent
from files import mask_files
from masking.layers import find_layers
from masking.loading import model_fingerprint

PLACE = "--dtype float32 --device cpu"


def hf_model(folder):
    """The model as transformers loads it, float32, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def write_lines(path, items: list) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def quiz() -> list[dict]:
    """Sentences to be finished, with four endings of unlike length; some contexts end in spaces, some are empty."""
    texts, items = training_text(), []
    for i in range(24):
        words = texts[i].split()
        cut = (0, 2, 3, 4)[i % 4] if i % 6 else 0
        endings = [" ".join(texts[4 * i + j].split()[cut + 1:][:1 + (i + j) % 5]) for j in range(4)]
        context, space = " ".join(words[:cut]), " " if i % 5 else ""
        items.append({"context": context + ("" if space else "  "), "choices": [space + ending for ending in endings],
                      "gold": i * 7 % 4})
    return items


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    """The three models, a text, and the quiz as a file."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, path in models.items():
        shutil.copytree(path, folder / name)
    (folder / "text.txt").write_text(" ".join(training_text()[:60]))
    write_lines(folder / "quiz.jsonl", quiz())
    return folder


@pytest.fixture(params=list(MODELS))
def loaded(request, folder):
    return hf_model(folder / request.param)


@pytest.fixture
def llama(folder):
    return hf_model(folder / "llama")


def run(arguments: str) -> None:
    evaluate.main(f"{PLACE} {arguments}".split())


# ------------------------------------------------------------------------------------------------------------- scoring


def plain_score(model, tokenizer, context: str, choice: str, bos: bool = True) -> float:
    """log p(choice | context) by one forward a choice and the chain rule, in float64."""
    ids = tokenizer(context + choice, add_special_tokens=bos).input_ids
    shared = tokenizer(context.rstrip(" "), add_special_tokens=bos).input_ids
    if not shared:
        shared = [tokenizer.bos_token_id]
        ids = shared + ids
    assert ids[:len(shared)] == shared
    start, ids = len(shared), torch.tensor(ids)
    if len(ids) > POSITIONS + 1:
        start, ids = start - (len(ids) - POSITIONS - 1), ids[-POSITIONS - 1:]
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0].double()
    return sum(float(logits[i - 1, ids[i]] - logits[i - 1].logsumexp(0)) for i in range(start, len(ids)))


@pytest.mark.parametrize("batchsize, bos", [(1, True), (5, True), (64, False)])
def test_scores_are_the_chain_rule(loaded, batchsize, bos):
    model, tokenizer = loaded
    pairs = [(item["context"], choice) for item in quiz() for choice in item["choices"]]
    pairs += [("The old cat " * 100, "watches the doctor."), ("The old cat " * 100, "watches.")]  # cut from the left
    requests = [zero_shot.encode(tokenizer, *pair, bos) for pair in pairs[:-2]]
    found = zero_shot.log_likelihoods(model, requests, batchsize)
    expected = [plain_score(model, tokenizer, *pair, bos) for pair in pairs]
    assert found == pytest.approx(expected[:-2], abs=1e-4)
    items = [{"context": pairs[-1][0], "choices": [pair[1] for pair in pairs[-2:]], "gold": gold} for gold in (0, 1)]
    found = [zero_shot.score_items(model, tokenizer, [item], batchsize, bos) for item in items]
    likeliest = max((0, 1), key=lambda k: expected[len(expected) - 2 + k])
    assert [n["acc"] for n in found] == [float(likeliest == gold) for gold in (0, 1)]


def test_accuracies_and_errors(loaded):
    model, tokenizer = loaded
    items = quiz()
    hits, hits_norm = [], []
    for item in items:
        scores = [plain_score(model, tokenizer, item["context"], choice) for choice in item["choices"]]
        norms = [score / len(choice[1:] if choice[0] == " " else choice)
                 for score, choice in zip(scores, item["choices"])]
        hits.append(max(range(4), key=scores.__getitem__) == item["gold"])
        hits_norm.append(max(range(4), key=norms.__getitem__) == item["gold"])
    assert hits != hits_norm and 0 < sum(hits) < len(hits)
    found = zero_shot.score_items(model, tokenizer, items)
    for metric, expected in (("acc", hits), ("acc_norm", hits_norm)):
        mean = sum(expected) / len(items)
        assert found[metric] == mean
        assert found[f"{metric}_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(items) - 1)))
    assert found["items"] == len(items)


class Letters:
    """A tokenizer of one token a letter, BOS 0 before a text."""
    bos_token_id = eos_token_id = 0

    def __call__(self, text, add_special_tokens=True, **_):
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1 + " abcde".index(letter) for letter in text])


class Unigram(torch.nn.Module):
    """p(a) = 1/2, p(b) = 1/4, p(c) = 1/8, p( ) = p(d) = p(e) = p(BOS) = 1/32, whatever came before."""
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.embedding, self.config = torch.nn.Embedding(7, 1), SimpleNamespace(max_position_embeddings=12)
        self.logits = torch.tensor([1 / 32, 1 / 32, 1 / 2, 1 / 4, 1 / 8, 1 / 32, 1 / 32]).log() + 3

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        assert input_ids.shape[1] <= 12
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 7))


def test_by_hand():
    """In bits: " b" 5 + 2, " aaa" 5 + 3: acc takes b; a character of theirs costs 7 and 8/3: acc_norm takes aaa."""
    item = {"context": "dd", "choices": [" b", " aaa"], "gold": 0, "place": "here"}
    requests = [zero_shot.encode(Letters(), "dd", choice) for choice in item["choices"]]
    assert requests[0] == ([0, 5, 5, 1, 3], 3)
    bits = [-score / math.log(2) for score in zero_shot.log_likelihoods(Unigram(), requests, 1)]
    assert bits == pytest.approx([7, 8], abs=1e-5)
    items = [item, {**item, "gold": 1}, {**item, "gold": 1}, {**item, "gold": 1}]
    found = zero_shot.score_items(Unigram(), Letters(), items)
    assert (found["acc"], found["acc_norm"]) == (0.25, 0.75)
    assert found["acc_stderr"] == found["acc_norm_stderr"] == 0.25  # sqrt(0.25 * 0.75 * 4 / 3 / 4)
    alone = zero_shot.score_items(Unigram(), Letters(), [item])
    assert (alone["acc"], alone["acc_stderr"]) == (1, None)
    tie = {"context": "", "choices": ["d", "e"], "gold": 0, "place": "here"}
    assert zero_shot.score_items(Unigram(), Letters(), [tie, {**tie, "gold": 1}])["acc"] == 0.5  # the first of equals


@pytest.mark.parametrize("item, words", [
    ({"context": "d" * 30, "choices": ["a" * 12, "a" * 13]}, ("line 3", "13 tokens", "12 positions")),
    ({"context": "", "choices": ["d", ""]}, ("line 3", "adds no token", "space"))])
def test_choices_that_cannot_be_scored(item, words):
    with pytest.raises(UserError) as error:
        zero_shot.score_items(Unigram(), Letters(), [{**item, "gold": 0, "place": "quiz.jsonl, line 3"}])
    assert all(word in str(error.value) for word in words)
    if len(item["choices"][0]) == 12:  # the longest that fits: all its tokens are scored
        whole = zero_shot.score_items(Unigram(), Letters(), [{**item, "choices": ["b" * 12, "a" * 12], "gold": 1}])
        assert whole["acc"] == 1


def test_scores_that_are_not_finite():
    model = Unigram()
    model.logits = model.logits * math.nan
    with pytest.raises(UserError, match=r"not finite.*--dtype"):
        zero_shot.score_items(model, Letters(), [{"context": "", "choices": ["a", "b"], "gold": 0}])


# ---------------------------------------------------------------------------------------------------------- task files

GOOD = '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}'


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"), ("[1]", "not a JSON object"), ("{}", "no context and no choices and no gold"),
    ('{"context": "a", "choices": ["b", "c"]}', "no gold"),
    ('{"context": 1, "choices": ["b", "c"], "gold": 0}', "context is not a string"),
    ('{"context": "a", "choices": "bc", "gold": 0}', "choices is not a list of two or more"),
    ('{"context": "a", "choices": ["b"], "gold": 0}', "choices is not a list of two or more"),
    ('{"context": "a", "choices": ["b", " "], "gold": 0}', "a choice is blank"),
    ('{"context": "a", "choices": ["b", 2], "gold": 0}', "not a string"),
    ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2, not the index of a choice, 0 to 1"),
    ('{"context": "a", "choices": ["b", "c"], "gold": -1}', "gold is -1"),
    ('{"context": "a", "choices": ["b", "c"], "gold": true}', "gold is true"),
    ('{"context": "a", "choices": ["b", "c"], "gold": "1"}', 'gold is "1"')])
def test_bad_lines(tmp_path, line, words):
    (tmp_path / "quiz.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        zero_shot.read_items(str(tmp_path / "quiz.jsonl"))
    assert f"{tmp_path}/quiz.jsonl, line 3: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("content, words", [(None, "cannot be read"), (b"\xff\xfe", "cannot be read"),
                                            (b"\n \n", "has no items")])
def test_bad_files(tmp_path, content, words):
    if content is not None:
        (tmp_path / "quiz.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        zero_shot.read_items(str(tmp_path / "quiz.jsonl"))


def test_good_files(tmp_path):
    """Line separators inside a string do not end the line; CRLF and an end without newline do no harm."""
    (tmp_path / "quiz.jsonl").write_bytes(GOOD.replace("sky", "sky\u2028\x0b").replace("\x0b", "\\u000b").encode()
                                          + b"\r\n" + GOOD.encode())
    items = zero_shot.read_items(str(tmp_path / "quiz.jsonl"))
    assert [item["context"] for item in items] == ["The sky\u2028\x0b is", "The sky is"]


# ------------------------------------------------------------------------------------------------------------- harness


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

    def task(output: str = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold",
             metrics: tuple[str, ...] = ("acc", "acc_norm")) -> str:
        (tmp_path / "local.yaml").write_text(
            f"task: local_quiz\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/theirs.jsonl}}\n"
            f"test_split: train\ndoc_to_text: context\n{output}\nmetric_list: "
            f"[{', '.join(f'{{metric: {metric}}}' for metric in metrics)}]\n")
        return str(tmp_path / "local.yaml")
    return task


@pytest.mark.parametrize("flags", ["", "--tasks_no_bos --tasks_batchsize 3", "--task_limit 5"])
def test_files_score_as_in_the_harness(folder, tmp_path, local_task, flags, capsys):
    for name in MODELS:
        run(f"--model {folder}/{name} --ppl none --tasks {local_task()} --task_file {tmp_path}/own.jsonl {flags} "
              f"--save {tmp_path}/{name}.json")
        record = json.loads((tmp_path / f"{name}.json").read_text())
        own, theirs = record["tasks"]["own"], record["tasks"]["local_quiz"]
        assert own.pop("source").startswith("file ") and theirs.pop("source").startswith("lm_eval 0.")
        assert own == pytest.approx(theirs)
        assert own["items"] == (5 if "limit" in flags else 13)
        assert record["mean_acc"] == pytest.approx(own["acc"])
        said = capsys.readouterr().out
        assert f"mean acc {100 * own['acc']:.2f} % (acc, not acc_norm; tasks: 2)" in said
        assert ("first 5 items" if "limit" in flags else "(13 items)") in said


@pytest.mark.parametrize("bos", [True, False])
def test_every_score_is_the_harness_one(loaded, bos):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = loaded
    pairs = [(item["context"], choice) for item in quiz() for choice in item["choices"] if item["context"].strip()]
    pairs += [("", "the old cat"), ("", "Every bird"), ("The old cat " * 60, " watches the doctor.")]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=None if bos else False)
    theirs = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    requests = [zero_shot.encode(tokenizer, *pair, bos) for pair in pairs]
    requests = [(ids[-POSITIONS - 1:], start - max(0, len(ids) - POSITIONS - 1)) for ids, start in requests]
    assert zero_shot.log_likelihoods(model, requests, 4) == pytest.approx([score for score, _ in theirs], abs=1e-4)


HUB = {  # rows of the Hub's data sets for the field's seven tasks, and for a group
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
                           "answerKey": "B"},
    "cais/mmlu": {"question": "What hears?", "choices": ["A fox", "Rain", "Winter", "Ice"], "answer": 0}}
SEVEN = "hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa"


def test_the_fields_seven_tasks(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")

    def load_dataset(path, *args, **kwargs):
        rows = datasets.Dataset.from_list([HUB[path]] * 3)
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arc = HUB["allenai/ai2_arc"]
    write_lines(tmp_path / "arc.jsonl", [{"context": f"Question: {arc['question']}\nAnswer:", "gold": 1,
                                          "choices": [f" {choice}" for choice in arc["choices"]["text"]]}] * 2)
    run(f"--model {folder}/llama --ppl none --tasks {SEVEN} --task_limit 2 --task_file {tmp_path}/arc.jsonl "
          f"--save {tmp_path}/seven.json")
    record, said = json.loads((tmp_path / "seven.json").read_text()), capsys.readouterr().out
    assert list(record["tasks"]) == ["arc", *SEVEN.split(",")] and record["task_limit"] == 2
    assert {name for name, task in record["tasks"].items() if "acc_norm" not in task} == {"race", "winogrande"}
    own, theirs = record["tasks"]["arc"], record["tasks"]["arc_easy"]
    assert {**own, "source": ""} == {**theirs, "source": ""} == {
        "acc": own["acc"], "acc_stderr": 0, "acc_norm": own["acc_norm"], "acc_norm_stderr": 0, "items": 2, "source": ""}
    assert record["mean_acc"] == sum(task["acc"] for task in record["tasks"].values()) / 8
    assert f"mean acc {100 * record['mean_acc']:.2f} % (acc, not acc_norm; tasks: 8)" in said
    assert list(zero_shot.load_harness(["ai2_arc"])) == ["arc_challenge", "arc_easy"]  # a tag stands for its tasks
    with pytest.raises(UserError, match="--tasks mmlu_other is a group; name its tasks: mmlu_"):
        zero_shot.load_harness(["mmlu_other"])


def test_tasks_that_are_refused(folder, local_task, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rolling = local_task("output_type: loglikelihood_rolling\ndoc_to_target: context", ("word_perplexity",))
    for name, words in [("wikitext", "perplexity by words.*--ppl wikitext2"), ("helaswag", "no such task.*hellaswag"),
                        (rolling, "local_quiz has no acc but word_perplexity.*leave it out")]:
        with pytest.raises(UserError, match=words):
            run(f"--model {folder}/llama --tasks {name}")

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


def test_two_tasks_of_one_name(folder, tmp_path):
    with pytest.raises(UserError, match="two tasks have one name"):
        run(f"--model {folder}/llama --task_file {folder}/quiz.jsonl {write_lines(tmp_path / 'quiz.jsonl', quiz())}")


# --------------------------------------------------------------------------------------------------- text and sparsity


def test_tokens_of_the_text_and_of_the_windows(folder, tmp_path, llama, capsys):
    run(f"--model {folder}/llama --ppl {folder}/text.txt --seqlen 50 --nwindows 3 --save {tmp_path}/a.json")
    record, said = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    ids = llama[1]((folder / "text.txt").read_text()).input_ids
    assert len(ids) % 50 and (record["text_tokens"], record["tokens"], record["windows"]) == (len(ids), 150, 3)
    assert record["fingerprint"] == data.fingerprint(torch.tensor(ids[:150]).view(3, 50))
    assert f"150 tokens in the windows, {len(ids):,} in the text" in said and f"written to {tmp_path}/a.json" in said


def test_no_text(folder, tmp_path, capsys):
    run(f"--model {folder}/llama --ppl none --save {tmp_path}/a.json")
    assert "ppl" not in json.loads((tmp_path / "a.json").read_text())
    weights = sum(module.weight.numel() for module in find_layers(hf_model(folder / "llama")[0]).values())
    assert f"density 1.000000, {weights:,} of {weights:,} weights not zero\n" in capsys.readouterr().out


def sparse_copy(folder, target, change) -> None:
    """The Llama at 2:4 by position, every layer, then change(tensors)."""
    model, tokenizer = hf_model(folder / "llama")
    for module in find_layers(model).values():
        module.weight.data.view(-1, 4)[:, 1::2] = 0.0
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_exact_density(folder, tmp_path, capsys):
    """One weight less in one layer is seen, and is no breach of the pattern."""
    sparse_copy(folder, tmp_path / "sparse",
                lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1, 4)[5].zero_())
    run(f"--model {tmp_path}/sparse --ppl none --sparsity_type 2:4")
    weights = sum(module.weight.numel() for module in find_layers(hf_model(folder / "llama")[0]).values())
    record = json.loads((tmp_path / "sparse/evaluation.json").read_text())
    assert record["density"] == (weights // 2 - 2) / weights and record["sparsity_type"] == "2:4"
    assert "2:4 in every masked layer, density 0.49997" in (said := capsys.readouterr().out)
    assert f"{weights // 2 - 2:,} of {weights:,} weights not zero" in said


@pytest.mark.parametrize("value, words", [(1.0, r"down_proj \(1 blocks\)"), (-0.0, r"down_proj \(1 zeros are -0.0\)")])
def test_one_weight_breaks_the_pattern(folder, tmp_path, value, words):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].view(-1, 4)[7, 3] = value
    sparse_copy(folder, tmp_path / "sparse", change)
    with pytest.raises(UserError, match=f"1 of 14 layers are not 2:4 sparse: model.layers.1.mlp.{words}"):
        run(f"--model {tmp_path}/sparse --ppl none --sparsity_type 2:4")
    assert not (tmp_path / "sparse/evaluation.json").exists()
    run(f"--model {tmp_path}/sparse --ppl none --sparsity_type 2:4 --targets self_attn")


# ------------------------------------------------------------------------------------------------ where the numbers go


@pytest.fixture
def model_copy(models, tmp_path):
    return shutil.copytree(models["llama"], tmp_path / "model")


@pytest.fixture
def nothing_loads(monkeypatch):
    def load_model(**given):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(evaluate, "load_model", load_model)


def test_beside_the_model_and_never_over_it(model_copy, capsys, request):
    run(f"--model {model_copy} --ppl none")
    assert json.loads((model_copy / "evaluation.json").read_text())["density"] == 1
    request.getfixturevalue("nothing_loads")
    with pytest.raises(UserError, match=r"evaluation.json exists already; choose another file with --save, or remove"):
        run(f"--model {model_copy} --ppl none")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_beside_the_mask(folder, model_copy, tmp_path, kind):
    model, _ = hf_model(model_copy)
    kept = torch.tensor([True, False, True, False])
    masks = {name: kept.repeat(module.weight.numel() // 4).view_as(module.weight)
             for name, module in find_layers(model).items()}
    mask = tmp_path / {"file": "mask.v1.safetensors", "folder": "mask.v1"}[kind]
    if kind == "file":
        mask_files.save(mask, masks, 2, 4, "model", model_fingerprint(model))
    else:
        mask_files.save_folder(mask, masks)
    run(f"--model {model_copy} --mask {mask} --ppl none")
    record = json.loads((tmp_path / "mask.v1.evaluation.json").read_text())
    assert record["density"] == 0.5 and record["mask_fingerprint"] == mask_files.fingerprint(masks)
    assert not (model_copy / "evaluation.json").exists()
    with pytest.raises(UserError, match=r"mask.v1.evaluation.json exists already"):
        run(f"--model {model_copy} --mask {mask} --ppl none")
    shutil.rmtree(mask) if kind == "folder" else mask.unlink()
    other = {name: ~mask for name, mask in masks.items()}  # in the place of the first, and as dense
    if kind == "file":
        mask_files.save(mask, other, 2, 4, "model", model_fingerprint(model))
    else:
        mask_files.save_folder(mask, other)
    with pytest.raises(UserError, match=rf"another model: the mask \({record['mask_fingerprint']} there, "):
        run(f"--model {model_copy} --mask {mask} --ppl {folder}/text.txt --seqlen 50")


def test_another_text_and_another_task_are_added(folder, model_copy, tmp_path, capsys, monkeypatch):
    """What was there stays as it was; each number is there once; the table has them in one row."""
    file, command = model_copy / "evaluation.json", f"--model {model_copy} --seqlen 50 --ppl"
    shutil.copyfile(folder / "text.txt", tmp_path / "again.txt")
    (tmp_path / "other.txt").write_text(" ".join(training_text()[60:90]))
    run(f"{command} {folder}/text.txt --nwindows 3")
    first = json.loads(file.read_text())
    run(f"{command} {tmp_path}/other.txt --nwindows 2")
    run(f"{command} {folder}/text.txt --nwindows 4 --bos --task_file {folder}/quiz.jsonl")
    whole = json.loads(file.read_text())
    later = whole.pop("later")
    assert whole == first and [record["windows"] for record in later] == [2, 4]
    assert [later[1]["bos"], list(later[1]["tasks"])] == [True, ["quiz"]] and "tasks" not in later[0]
    before = file.read_bytes()
    monkeypatch.setattr(evaluate, "batch_loss", None)  # none of these gets as far
    for flags, words in [(f"{folder}/text.txt --nwindows 3", f"the perplexity of these tokens, {first['ppl']}"),
                         (f"{tmp_path}/again.txt --nwindows 3", "the perplexity of these tokens"),
                         (f"{tmp_path}/other.txt --nwindows 2", "the perplexity of these tokens"),
                         (f"{folder}/text.txt --nwindows 4 --bos", "the perplexity of these tokens"),
                         (f"none --task_file {folder}/quiz.jsonl", "quiz"),
                         ("none", ""),
                         (f"{folder}/text.txt --dtype bfloat16", "--dtype (float32 there, bfloat16")]:
        with pytest.raises(UserError) as error:
            run(f"{command} {flags}")
        assert "evaluation.json exists already" in str(error.value) and words in str(error.value)
        assert str(error.value).endswith("; choose another file with --save, or remove it")
    assert file.read_bytes() == before
    capsys.readouterr()
    run(f"--compare {model_copy}")
    head, _, row = table_of(capsys.readouterr().out)
    assert head[3:] == [f"perplexity, {what}" for what in ("text.txt, 3 windows of 50 tokens",
                                                           "other.txt, 2 windows of 50 tokens",
                                                           "text.txt, 4 windows of 50 tokens after BOS")] + [
        "quiz acc (%, 24 items)", "quiz acc_norm (%, 24 items)"]
    assert row[3:7] == [*(f"{numbers['ppl']:.3f}" for numbers in (first, *later)), percent(later[1]["tasks"]["quiz"],
                                                                                          "acc")]


def test_what_was_added_meanwhile_is_kept(folder, model_copy, monkeypatch):
    """Two evaluations at a time: the one that ends last adds to what the other has written."""
    loss = evaluate.batch_loss

    def another_ends_first(*args, **names):
        monkeypatch.setattr(evaluate, "batch_loss", loss)
        run(f"--model {model_copy} --ppl {folder}/text.txt --seqlen 30 --nwindows 1")
        return loss(*args, **names)
    monkeypatch.setattr(evaluate, "batch_loss", another_ends_first)
    run(f"--model {model_copy} --ppl {folder}/text.txt --seqlen 40 --nwindows 1")
    record = json.loads((model_copy / "evaluation.json").read_text())
    assert [record["seqlen"], *(numbers["seqlen"] for numbers in record["later"])] == [30, 40]


@pytest.mark.parametrize("content", ["{", "[]", "{\"later\": [1]}", "{\"later\": 1}", "{\"tasks\": [1]}"])
def test_nothing_is_added_to_what_is_no_record(folder, model_copy, nothing_loads, content):
    (model_copy / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation.json exists already and is no record of evaluate.py.*--save"):
        run(f"--model {model_copy} --ppl {folder}/text.txt")
    assert (model_copy / "evaluation.json").read_text() == content


def test_a_folder_that_cannot_be_written(model_copy, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: False)
    run(f"--model {model_copy} --ppl none")
    assert not (model_copy / "evaluation.json").exists()
    assert f"not written: {model_copy} cannot be written to; --save FILE keeps the numbers" in capsys.readouterr().out


def test_a_hub_id(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda **given: hf_model(folder / "llama"))
    run("--model someone/model --ppl none")
    assert "not written: someone/model is no folder here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- --compare


def record(**changes) -> dict:
    return {"model": "m", "mask": None, "sparsity_type": None, "density": 1.0, **changes}


def text(ppl: float, **changes) -> dict:
    return {"ppl": ppl, "text": "some/text.txt", "seqlen": 512, "windows": 32, "fingerprint": "aa", **changes}


def task(acc: float, **changes) -> dict:
    return {"acc": acc, "acc_stderr": 0.01, "items": 100, "source": "lm_eval 0.4.13", **changes}


def table_of(said: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("|")]


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
