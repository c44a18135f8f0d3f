"""generate_text.py: documents follow the model's own probabilities, end where it ends them, and can be learned from."""
import json
from types import SimpleNamespace

from utils import UserError, set_seed

import pytest
import torch
import transformers

import data
import generate_text


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    """A million draws; what has no probability is never drawn."""
    logits = torch.tensor([0.0, -1.0, 2.0, -torch.inf, 1.5, -6.0])
    set_seed(0)
    drawn = generate_text.Draw()(None, logits.expand(1_000_000, 6))
    assert (drawn.isfinite().sum(1) == 1).all()
    seen, wanted = drawn.isfinite().double().mean(0), logits.double().softmax(0)
    assert ((seen - wanted).abs() <= 5 * (wanted * (1 - wanted) / 1e6).sqrt()).all() and seen[3] == 0


def test_the_last_token_is_the_furthest_that_is_drawn(monkeypatch):
    """Rounding may bring the drawn number up to the sum of all probabilities."""
    monkeypatch.setattr(torch, "rand", torch.ones)
    assert generate_text.Draw()(None, torch.zeros(2, 5)).argmax(1).tolist() == [4, 4]


@pytest.mark.parametrize("kind, first", [("llama", "<s>"), ("gpt2", "<|endoftext|>"), ("opt", "</s>")])
def test_a_document_begins_as_the_tokenizer_begins_one(models, kind, first):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[kind])
    assert tokenizer.convert_ids_to_tokens(generate_text.start_of_text(tokenizer)) == first


def test_a_tokenizer_without_a_beginning_is_refused():
    class Tokenizer(SimpleNamespace):
        def __call__(self, text):
            return SimpleNamespace(input_ids=[])
    assert generate_text.start_of_text(Tokenizer(bos_token_id=0, eos_token_id=None)) == 0
    with pytest.raises(UserError, match="no token that begins or ends a text"):
        generate_text.start_of_text(Tokenizer(bos_token_id=None, eos_token_id=None))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_documents_end_where_the_model_ends_them(load, models, kind):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[kind])
    model = load(kind)
    end = tokenizer.eos_token_id
    with torch.no_grad():  # so that it ends a text now and then: its final norm gets one constant direction more
        head = model.get_output_embeddings().weight
        head[end] = head.norm(dim=1).max() * torch.nn.functional.normalize(head[end], dim=0)
    set_seed(1)
    documents = generate_text.generate(model, tokenizer, 200, 20)
    assert len(documents) == 200 and all(len(tokens) <= 20 and end not in tokens for tokens in documents)
    assert any(len(tokens) < 20 for tokens in documents) and any(len(tokens) == 20 for tokens in documents)
    set_seed(1)
    assert generate_text.generate(model, tokenizer, 200, 20) == documents


def test_a_model_may_have_several_ends(load, models):
    """Those of its generation_config count beside the tokenizer's."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(models["llama"]), load("llama")
    set_seed(1)
    whole = generate_text.generate(model, tokenizer, 50, 20)
    other = whole[0][3]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    for _ in range(2):
        set_seed(1)
        documents = generate_text.generate(model, tokenizer, 50, 20)
        assert not any(other in tokens for tokens in documents) and len(documents[0]) <= 3
        assert documents[0] == whole[0][:whole[0].index(other)]


def test_documents_go_on_from_passages(load, models, monkeypatch):
    """Each from one of them, as if no longer one were in the same batch, and each about as often."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(models["llama"]), load("llama")
    passages = [[5, 9, 7], [11], [4, 8, 15, 16, 23, 42]]
    monkeypatch.setattr(generate_text.Draw, "__call__", lambda self, tokens, scores: scores)  # the most probable
    alone = [generate_text.generate(model, tokenizer, 1, 12, [passage])[0] for passage in passages]
    sequence = torch.tensor([[generate_text.start_of_text(tokenizer), *passages[0]]])
    for token in alone[0]:
        assert model(input_ids=sequence).logits[0, -1].argmax() == token
        sequence = torch.cat([sequence, torch.tensor([[token]])], 1)
    assert len({tuple(tokens) for tokens in alone}) == 3
    set_seed(0)
    together = generate_text.generate(model, tokenizer, 60, 12, passages)
    counts = [together.count(tokens) for tokens in alone]
    assert sum(counts) == 60 and min(counts) > 9


def test_passages_are_cut_and_empty_ones_left_out(models, tmp_path):
    tokenizer, file = transformers.AutoTokenizer.from_pretrained(models["llama"]), tmp_path / "passages.jsonl"
    file.write_text('{"text": ""}\n{"text": "some of the kind of text that is wanted"}\n{"text": "short"}\n')
    long, short = generate_text.read_passages(str(file), tokenizer, 4)
    whole = tokenizer("some of the kind of text that is wanted", add_special_tokens=False).input_ids
    assert long == whole[:4] and len(whole) > 4 and short == tokenizer("short", add_special_tokens=False).input_ids[:4]
    file.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no passages"):
        generate_text.read_passages(str(file), tokenizer, 4)


def test_the_models_own_settings_of_generation_change_nothing(load, models):
    """A penalty on repetition would make the text another one than the model's own."""
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(models["llama"]), []
    for settings in {}, {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1}:
        model = load("llama")
        model.generation_config.update(**settings)
        set_seed(1)
        texts.append(generate_text.generate(model, tokenizer, 4, 30))
    assert texts[0] == texts[1] and any(len(set(tokens)) < len(tokens) for tokens in texts[0])


def test_the_script(models, tmp_path, capsys):
    """What it writes is a --dataset of at least so many tokens; a file that is there stays."""
    out = tmp_path / "generated.jsonl"
    flags = f"--model {models['llama']} --dtype float32 --device cpu --tokens 600 --sqlen 32 --batchsize 8 --out {out}"
    generate_text.main(flags.split())
    said = capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert said.startswith(f"{len(texts)} documents, ") and int(said.split()[2]) >= 600
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["llama"])
    assert data.token_sequences(tokenizer, str(out), 512, 4, 32, 0).shape == (4, 4, 32)
    with pytest.raises(UserError, match="exists"):
        generate_text.main(flags.split())
    generate_text.main(f"{flags.replace(str(out), str(tmp_path / 'alike.jsonl'))} --after {out}".split())
    assert (tmp_path / "alike.jsonl").read_text() != out.read_text()


@pytest.mark.parametrize("passage, words", [("", "--sqlen 300 is more than the 256"),
                                            ("a long one " * 200, "--sqlen 200, behind a passage of 200 tokens, is")])
def test_more_tokens_than_the_model_has_positions(models, tmp_path, passage, words):
    (tmp_path / "passages.txt").write_text(passage)
    flags = f"--model {models['llama']} --dtype float32 --device cpu --out {tmp_path}/generated.jsonl "
    flags += f"--sqlen 200 --after {tmp_path}/passages.txt" if passage else "--sqlen 300"
    with pytest.raises(UserError, match=words):
        generate_text.main(flags.split())


def test_a_model_that_ends_every_text_at_once(models, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_text, "generate", lambda *args: [[], []])
    flags = f"--model {models['llama']} --dtype float32 --device cpu --out {tmp_path}/generated.jsonl"
    with pytest.raises(UserError, match="ends every text at once"):
        generate_text.main(flags.split())
    assert not (tmp_path / "generated.jsonl").exists()


def test_the_faster_attention_is_taken_and_no_random_number_used_up(models, load, monkeypatch):
    model, tokenizer = load(), transformers.AutoTokenizer.from_pretrained(models["llama"])
    clock, chosen, cost = [0.0], [], {"eager": 1.0, "sdpa": 3.0}
    monkeypatch.setattr(model, "set_attn_implementation", chosen.append, raising=False)
    monkeypatch.setattr(generate_text.time, "perf_counter", lambda: clock[0])

    def generate(*_):
        clock[0] += cost[chosen[-1]]
        torch.rand(5)
    monkeypatch.setattr(generate_text, "generate", generate)
    for name in ("eager", "sdpa"):
        cost[name] = 0.5
        state = torch.get_rng_state()
        assert generate_text.choose_attention(model, tokenizer, 4) == name == chosen[-1]
        assert torch.equal(torch.get_rng_state(), state)
        cost[name] = 2.0

