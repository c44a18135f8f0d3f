"""generate_text.py: documents follow the model's own probabilities, end where it ends them, and can
be learned from."""

import json

import data
import generate_text
from models import generation
from models.machine import set_seed
from utils import UserError

import pytest
import tiny
import torch
import transformers
from runs import raises


@pytest.fixture
def llama(load, models):
    return load(), transformers.AutoTokenizer.from_pretrained(models["llama"])


def drawn(*given, seed=1):
    set_seed(seed)
    return generation.generate(*given)


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    """A million draws; what has no probability is never drawn."""
    logits = torch.tensor([0.0, -1.0, 2.0, -torch.inf, 1.5, -6.0])
    set_seed(0)
    drawn = generation.Draw()(None, logits.expand(1_000_000, 6))
    assert (drawn.isfinite().sum(1) == 1).all()
    seen, wanted = drawn.isfinite().double().mean(0), logits.double().softmax(0)
    assert ((seen - wanted).abs() <= 5 * (wanted * (1 - wanted) / 1e6).sqrt()).all() and seen[
        3
    ] == 0
    with pytest.raises(UserError, match="predictions are not finite"):
        generation.Draw()(None, torch.tensor([[0.0, torch.nan, 2.0]]))


@pytest.mark.parametrize(
    "kind, first", [("sentencepiece", "<s>"), ("opt", "</s>"), ("ended", "<s>")]
)
def test_a_document_begins_as_the_tokenizer_begins_one(tokenizers, kind, first):
    tokenizer = tokenizers[kind]
    assert tokenizer.convert_ids_to_tokens(generation.start_of_text(tokenizer)) == first


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_documents_end_where_the_model_ends_them(load, models, kind):
    model, tokenizer = load(kind), transformers.AutoTokenizer.from_pretrained(models[kind])
    end = tokenizer.eos_token_id
    # so that it ends a text now and then: its final norm gets one constant direction more
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[end] = head.norm(dim=1).max() * torch.nn.functional.normalize(head[end], dim=0)
    documents = drawn(model, tokenizer, 200, 20)
    assert len(documents) == 200 and all(
        len(tokens) <= 20 and end not in tokens for tokens in documents
    )
    assert any(len(tokens) < 20 for tokens in documents) and any(
        len(tokens) == 20 for tokens in documents
    )
    whole = next(tokens for tokens in documents if len(tokens) == 20)
    model.generation_config.eos_token_id = [end, whole[3]]  # its own count beside the tokenizer's
    for _ in range(2):
        again = drawn(model, tokenizer, 200, 20)
        assert not any(whole[3] in tokens for tokens in again)
        assert again[documents.index(whole)] == whole[: whole.index(whole[3])]


def test_documents_go_on_from_passages(llama, monkeypatch):
    """Each from one of them, as if no longer one were in the same batch, and each about as
    often."""
    model, tokenizer = llama
    passages = [[5, 9, 7], [11], [4, 8, 15, 16, 23, 42]]
    # the most probable
    monkeypatch.setattr(generation.Draw, "__call__", lambda self, tokens, scores: scores)
    alone = [generation.generate(*llama, 1, 12, [passage])[0] for passage in passages]
    sequence = torch.tensor([[generation.start_of_text(tokenizer), *passages[0]]])
    for token in alone[0]:
        assert model(input_ids=sequence).logits[0, -1].argmax() == token
        sequence = torch.cat([sequence, torch.tensor([[token]])], 1)
    assert len({tuple(tokens) for tokens in alone}) == 3
    read = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].shape)
    )
    together = drawn(*llama, 60, 12, passages, seed=0)
    hook.remove()
    assert read[0] == (3, 6) and set(read[1:]) == {(60, 1)}  # each is read once
    counts = [together.count(tokens) for tokens in alone]
    assert sum(counts) == 60 and min(counts) > 9


def test_passages_are_cut_and_empty_ones_left_out(llama, tmp_path):
    (model, tokenizer), file = llama, tmp_path / "passages.jsonl"
    file.write_text(
        '{"text": ""}\n{"text": "some of the kind of text that is wanted"}\n{"text": "short"}\n'
    )
    long, short = generation.read_passages(str(file), model, tokenizer, 4)
    whole = tokenizer("some of the kind of text that is wanted", add_special_tokens=False).input_ids
    assert (
        long == whole[:4]
        and len(whole) > 4
        and short == tokenizer("short", add_special_tokens=False).input_ids[:4]
    )


def test_passages_of_unequal_lengths_are_not_for_models_whose_convolutions_read_padding(
    llama, tmp_path
):
    mamba = tiny.random_model(
        "Mamba", vocab_size=352, hidden_size=64, num_hidden_layers=1, state_size=4
    )
    file = tmp_path / "passages.jsonl"
    file.write_text('{"text": "some of the kind of text that is wanted"}\n{"text": "short"}\n')
    with pytest.raises(
        UserError,
        match=r"leaks through .*\(Mamba\): give --after passages of at least 8 tokens each",
    ):
        generation.read_passages(str(file), mamba, llama[1], 8)
    assert len(generation.read_passages(str(file), mamba, llama[1], 1)) == 2


def test_the_models_own_settings_of_generation_change_nothing(llama):
    """A penalty on repetition would make the text another one than the model's own."""
    texts, likely = [], []
    for settings in {}, {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1}:
        before = llama[0].generation_config
        before.update(**settings)
        texts.append(drawn(*llama, 4, 30))
        likely.append(generation.continuation(*llama, torch.tensor([1, 5, 9]), 30))
        assert llama[0].generation_config is before  # as the sparse model has it
    assert likely[0] == likely[1]
    assert texts[0] == texts[1] and any(len(set(tokens)) < len(tokens) for tokens in texts[0])


def flags(models, out):
    return f"--model {models['llama']} --dtype float32 --device cpu --out {out}"


def test_the_script(models, llama, tmp_path, capsys):
    """What it writes is a --dataset of at least so many tokens; a file that is there stays."""
    out, size = tmp_path / "generated.jsonl", "--tokens 600 --seqlen 32 --batchsize 8"
    generate_text.main(f"{flags(models, out)} {size}".split())
    said = capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert said.startswith(f"{len(texts)} documents, ") and int(said.split()[2]) >= 600
    assert data.token_sequences(llama[1], [str(out)], 512, 4, 32, 0).shape == (4, 4, 32)
    with pytest.raises(UserError, match="exists"):
        generate_text.main(f"{flags(models, out)} {size}".split())
    generate_text.main(f"{flags(models, tmp_path / 'alike.jsonl')} {size} --after {out}".split())
    assert (tmp_path / "alike.jsonl").read_text() != out.read_text()


def test_where_memory_is_full_fewer_documents_are_written_at_a_time(llama, tmp_path, monkeypatch):
    counts = []

    def generate(model, tokenizer, count, *_):
        counts.append(count)
        return [[5] * 7] * count if count < 3 else raises(torch.OutOfMemoryError())()

    monkeypatch.setattr(generation, "generate", generate)
    assert generation.write_text(tmp_path / "text.jsonl", *llama, 35, 8, 9, seed=2**62) == (5, 35)
    assert counts == [5, 2, 2, 1]


@pytest.mark.parametrize(
    "further, words",
    [
        ("--seqlen 300", "--seqlen 300 exceeds the model's 256"),
        ("--out text.txt", "text.txt must end in .jsonl"),
        ("--seqlen 200 --after passages.txt", "--seqlen 200, after a passage of 200 tokens, ex"),
        ("--model absent --after gone.txt", "gone.txt: no such file"),
    ],
)
def test_what_cannot_be_generated_is_refused(models, tmp_path, monkeypatch, further, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passages.txt").write_text("a long one " * 200)
    with pytest.raises(UserError, match=words):
        generate_text.main(f"{flags(models, 'generated.jsonl')} {further}".split())


def test_after_an_interruption_it_goes_on_to_the_same_text(llama, tmp_path, monkeypatch):
    generate, counts = generation.generate, []

    def interrupted(model, tokenizer, count, *given):
        counts.append(count)
        return (generate if len(counts) != 2 else raises(KeyboardInterrupt))(
            model, tokenizer, count, *given
        )

    monkeypatch.setattr(generation, "generate", interrupted)
    stopped, whole = tmp_path / "text.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generation.write_text(stopped, *llama, 40, 8, 2, seed=3)
    # another text, from its start
    generation.write_text(tmp_path / "text.jsonl", *llama, 14, 8, 2, seed=4)
    assert stopped.read_text().count("\n") == 2
    stopped.unlink()
    for path in stopped, whole:
        generation.write_text(path, *llama, 40, 8, 2, seed=3)
    assert (stopped.read_text(), counts, sorted(tmp_path.iterdir())) == (
        whole.read_text(),
        [2] * 8,
        [stopped, whole],
    )


def test_an_empty_text_is_drawn_anew(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        generation, "generate", lambda *args: [[5] * 7] if torch.rand(()) < 0.1 else [[]]
    )
    assert generation.write_text(tmp_path / "text.jsonl", *llama, 84, 8, 1) == (12, 84)


def test_a_model_that_ends_every_text_at_once(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *args: [[], []])
    with pytest.raises(UserError, match="ends every text at once"):
        generation.write_text(tmp_path / "text.jsonl", *llama, 84, 8, 2)
    assert not (tmp_path / "text.jsonl").exists()
