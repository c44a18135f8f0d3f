"""evaluation/zero_shot.py: scores against plain loops and by hand; task files."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

from evaluation import zero_shot
from utils import UserError

import pytest
import torch
from quizzes import quiz, run, write_lines

# ------------------------------------------------------------------------------------------------------------- scoring


def plain_score(model, tokenizer, context: str, choice: str, bos: bool = True) -> float:
    """log p(choice | context) by one forward a choice and the chain rule, in float64."""
    ids = tokenizer(context + choice, add_special_tokens=bos).input_ids
    shared = tokenizer(context.rstrip(" "), add_special_tokens=bos).input_ids
    if not shared:
        shared = [tokenizer.bos_token_id]
        ids = shared + ids
    start, ids = len(shared), torch.tensor(shared + ids[len(shared):])
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0].double()
    return sum(float(logits[i - 1, ids[i]] - logits[i - 1].logsumexp(0)) for i in range(start, len(ids)))


@pytest.mark.parametrize("batchsize, bos", [(1, True), (5, True), (64, False)])
def test_scores_are_the_chain_rule(loaded, batchsize, bos):
    model, tokenizer = loaded
    pairs = [(item["context"], choice) for item in quiz() for choice in item["choices"]]
    pairs.append(("every do", "g follows the bird."))  # a dog is another token than do
    requests = [zero_shot.encode(tokenizer, *pair, bos) for pair in pairs]
    expected = [plain_score(model, tokenizer, *pair, bos) for pair in pairs]
    assert zero_shot.log_likelihoods(model, requests, batchsize) == pytest.approx(expected, abs=1e-4)


class Letters:
    """A tokenizer of one token a letter, BOS 0 before a text."""
    bos_token_id = eos_token_id = 0
    end = ()  # after a text

    def __call__(self, text, add_special_tokens=True, **_):
        tokens = [1 + " abcde".index(letter) for letter in text]
        return SimpleNamespace(input_ids=[0, *tokens, *self.end] if add_special_tokens else tokens)


class Unigram(torch.nn.Module):
    """p(a) = 1/2, p(b) = 1/4, p(c) = 1/8, p( ) = p(d) = p(e) = p(BOS) = 1/32, whatever came before; 12 positions."""
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


def test_by_hand(monkeypatch):
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
    monkeypatch.setattr(Letters, "end", (0,))  # nor context nor choice has it
    assert [zero_shot.encode(Letters(), "dd", choice) for choice in item["choices"]] == requests
    tie = {"context": "", "choices": ["d", "e"], "gold": 0, "place": "here"}
    assert zero_shot.score_items(Unigram(), Letters(), [tie, {**tie, "gold": 1}])["acc"] == 0.5  # the first of equals


@pytest.mark.parametrize("scale, choices, words", [
    (1, ["a" * 12, "a" * 13], "line 3: a choice of 13 tokens is more than the 12 positions"),
    (1, ["d", ""], "line 3: the choice '' adds no token to its context; begin it with a space"),
    (math.nan, ["a", "b"], "not finite.*--dtype"), (1, ["b" * 12, "a" * 12], None)])
def test_choices_that_cannot_be_scored(scale, choices, words):
    """The last is the longest that can be: all its tokens are scored."""
    model, item = Unigram(), {"context": "d" * 30, "choices": choices, "gold": 1, "place": "quiz.jsonl, line 3"}
    model.logits = model.logits * scale
    with pytest.raises(UserError, match=words) if words else nullcontext():
        assert zero_shot.score_items(model, Letters(), [item])["acc"] == 1


# ---------------------------------------------------------------------------------------------------------- task files

GOOD = '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}'


@pytest.mark.parametrize("line", [
    "{", "[1]", "{}", '{"context": "a", "choices": "bc", "gold": 0}',
    '{"context": "a", "choices": ["b", " "], "gold": 0}',
    '{"context": "\\ud800", "choices": ["b", "c"], "gold": 0}', '{"context": "a", "choices": ["b", "c"], "gold": 2}',
    '{"context": "a", "choices": ["b", "c"], "gold": true}'])
def test_bad_lines(tmp_path, line):
    (tmp_path / "quiz.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError, match=r"quiz.jsonl: line 3 is no item: it needs a context, two or more choices"):
        zero_shot.read_items(str(tmp_path / "quiz.jsonl"))


def test_good_files(tmp_path):
    """Line separators inside a string do not end the line; CRLF and an end without newline do no harm."""
    (tmp_path / "quiz.jsonl").write_bytes(GOOD.replace("sky", "sky\u2028\x0b").replace("\x0b", "\\u000b").encode()
                                          + b"\r\n" + GOOD.encode())
    items = zero_shot.read_items(str(tmp_path / "quiz.jsonl"))
    assert [item["context"] for item in items] == ["The sky\u2028\x0b is", "The sky is"]


def test_two_tasks_of_one_name(folder, tmp_path):
    with pytest.raises(UserError, match="two tasks have one name"):
        run(f"--model {folder}/llama --task_file {folder}/quiz.jsonl {write_lines(tmp_path / 'quiz.jsonl', quiz())}")
