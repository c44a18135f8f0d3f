"""data.py against independent means: hand-made corpora of known lengths, and get_c4 as its authors
wrote it."""

import hashlib
import random
import struct

import data
from utils import UserError

import pytest
import torch
import transformers
from quizzes import write_lines
from words import Words, get_c4, read


@pytest.fixture(params=["sentencepiece", "opt", "gpt2"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


# -------------------------------------------------------------------------------------- minibatches


def test_minibatches_are_the_first_long_enough_documents(tmp_path):
    counts = [5, 3, 4, 9, 2, 6, 7, 8]  # words; Words() adds two special tokens
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"text": " ".join(["w" * (i + 2)] * n)} for i, n in enumerate(counts)],
    )
    batches = data.minibatches(Words(), path, dataset_size=4, batchsize=2, seqlen=6)
    # more than 6 tokens: documents 0 (7), 3 (11), 5 (8), 6 (9); document 2 has 6, which is not
    # enough
    assert batches.tolist() == [[[0] + [2] * 5, [0] + [5] * 5], [[0] + [7] * 5, [0] + [8] * 5]]
    assert batches.dtype == torch.int64


def test_minibatches_with_real_tokenizers(tokenizer, corpus):
    batches = data.minibatches(tokenizer, corpus, 16, 4, 128)
    ids = [tokenizer(text).input_ids for text in read(corpus)]
    assert all(len(row) >= 200 for row in ids)
    assert batches.shape == (4, 4, 128)
    assert batches.flatten(0, 1).tolist() == [row[:128] for row in ids if len(row) > 128][:16]


def endless(monkeypatch, text: str) -> list[int]:
    """Have data.documents yield this text without end; a list that grows with every document
    read."""
    opened = []

    def source(dataset):
        for i in range(10**9):
            opened.append(i)
            yield text

    monkeypatch.setattr(data, "documents", source)
    return opened


def test_reading_stops_when_enough(tmp_path, monkeypatch):
    read_so_far = endless(monkeypatch, "w w w w")
    assert data.minibatches(Words(), "endless", 6, 3, 4).shape == (2, 3, 4)
    assert len(read_so_far) == 6


def test_no_warning_and_no_bar(tokenizer, corpus, capfd, caplog):
    logger = transformers.utils.logging.get_logger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        data.minibatches(tokenizer, corpus, 16, 4, 128)
        data.perplexity_windows(tokenizer, corpus, 128)[0]
    finally:
        logger.propagate = before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((12, 5, 8), "--batchsize 5 does not divide --dataset_size 12: change one of them"),
        (
            (65, 5, 8),
            "only 64 of the 64 documents .* asks for 65: lower --dataset_size or --seqlen",
        ),
        ((64, 8, 100000), "only 0 of the 64 documents"),
    ],
)
def test_minibatches_refuse(sizes, message, tokenizers, corpus):
    with pytest.raises(UserError, match=message):
        data.minibatches(tokenizers["gpt2"], corpus, *sizes)


# ------------------------------------------------------------------------ sequences of running text


class WordsWithEnd(Words):
    eos_token_id = 99


def numbered(tmp_path, counts):
    """A corpus whose i-th document has so many words, each of i + 2 letters."""
    return write_lines(
        tmp_path / "numbered.jsonl",
        [{"text": " ".join(["w" * (i + 2)] * n)} for i, n in enumerate(counts)],
    )


@pytest.mark.parametrize("tokenizer, between", [(WordsWithEnd(), [99]), (Words(), [])])
def test_token_sequences_are_the_running_text_shuffled(tmp_path, tokenizer, between):
    """Every token of every document that is not blank once, in order within a sequence; what fills
    no minibatch is cut off."""
    tokenizer.eos_token_id = between[0] if between else None
    counts = [5, 0, 3, 11, 7, 2]
    stream = [
        token for i, n in enumerate(counts) if n for token in [0] + [i + 2] * n + [1] + between
    ]
    batches = data.token_sequences(
        tokenizer, [numbered(tmp_path, counts)], 10**6, batchsize=2, seqlen=4, seed=0
    )
    assert batches.dtype == torch.int64 and batches.shape == (len(stream) // 8, 2, 4)
    sequences = [stream[i : i + 4] for i in range(0, len(stream) // 8 * 8, 4)]
    found = batches.flatten(0, 1).tolist()
    assert sorted(found) == sorted(sequences) and found != sequences
    again = data.token_sequences(tokenizer, [numbered(tmp_path, counts)], 10**6, 2, 4, seed=0)
    other = data.token_sequences(tokenizer, [numbered(tmp_path, counts)], 10**6, 2, 4, seed=1)
    assert torch.equal(batches, again) and not torch.equal(batches, other)


@pytest.mark.parametrize("tokens, minibatches", [(1, 1), (8, 1), (15, 1), (16, 2), (25, 3)])
def test_token_sequences_stop_reading_at_the_budget(monkeypatch, tokens, minibatches):
    """Down to whole minibatches of 8 tokens, one at least; a document has 4 tokens."""
    opened = endless(monkeypatch, "w w")
    tokenizer = Words()
    tokenizer.eos_token_id = None
    assert data.token_sequences(tokenizer, ["endless"], tokens, 2, 4, 0).shape == (
        minibatches,
        2,
        4,
    )
    assert len(opened) == 2 * minibatches


def test_token_sequences_take_their_datasets_in_turn(tmp_path):
    """As many tokens of each, until one ends: of a long and a short one of 4 tokens a document."""
    files = [
        write_lines(tmp_path / f"{n}.jsonl", [{"text": " ".join(["w" * n] * 2)}] * count)
        for n, count in ((2, 99), (3, 4))
    ]
    tokenizer = Words()
    tokenizer.eos_token_id = None
    for tokens, short in ((24, 3), (80, 4)):
        assert (
            data.token_sequences(tokenizer, files, tokens, 2, 4, 0).flatten().tolist().count(3)
            == 2 * short
        )


@pytest.mark.parametrize(
    "name, first", [("sentencepiece", ["<s>"]), ("opt", ["</s>"]), ("gpt2", []), ("ended", [])]
)
def test_token_sequences_of_real_tokenizers(tokenizers, corpus, name, first):
    """All of a corpus, the end token after each document if there is one; the token that the
    tokenizer puts before a text is before each sequence, and not in the text."""
    tokenizer = tokenizers[name]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = tokenizer.convert_tokens_to_ids(first)
    stream = [
        token
        for text in read(corpus)
        for token in tokenizer(text, add_special_tokens=False).input_ids + end
    ]
    sequences = data.token_sequences(tokenizer, [corpus], 10**9, 1, 32, 0).flatten(0, 1).tolist()
    own = 32 - len(first)
    assert sorted(sequences) == sorted(
        first + stream[i : i + own] for i in range(0, len(stream) // own * own, own)
    )


@pytest.mark.parametrize("name, first", [("sentencepiece", "<s>"), ("opt", "</s>"), ("gpt2", None)])
def test_the_token_before_a_text_is_found_by_what_the_tokenizer_does(tokenizers, name, first):
    tokenizer = tokenizers[name]
    assert data.added_bos(tokenizer) == (first and tokenizer.convert_tokens_to_ids(first))
    # GPT-2 has one, too, and adds none
    assert data.wanted_bos(tokenizer) == tokenizer.bos_token_id is not None
    assert data.added_bos(Words()) is None
    with pytest.raises(UserError, match=r"--bos: .* no beginning-of-text token; leave out --bos"):
        data.wanted_bos(Words())


def test_token_sequences_behind_a_first_token(tmp_path):
    """As many sequences as the budget has room for, the first token counted; what else the
    tokenizer adds stays."""
    tokenizer = WordsWithEnd()
    tokenizer.bos_token_id = 0
    stream = [2] * 5 + [1, 99] + [4] * 3 + [1, 99]
    batches = data.token_sequences(
        tokenizer, [numbered(tmp_path, [5, 0, 3])], 10**6, batchsize=2, seqlen=4, seed=0
    )
    assert sorted(batches.flatten(0, 1).tolist()) == sorted(
        [0, *stream[i : i + 3]] for i in range(0, 12, 3)
    )
    assert data.token_sequences(tokenizer, [numbered(tmp_path, [50])], 27, 2, 4, 0).shape == (
        3,
        2,
        4,
    )
    with pytest.raises(UserError, match="has only 4 tokens, fewer than one minibatch of 2 x 4"):
        data.token_sequences(tokenizer, [numbered(tmp_path, [2])], 100, 2, 4, 0)


# ------------------------------------------------------------------------------ calibration samples


@pytest.mark.parametrize("seqlen", [16, 700])  # about half of the documents are too short for 700
def test_calibration_equals_get_c4(tokenizer, corpus, seqlen):
    random.seed(123)
    state = random.getstate()
    samples = data.calibration_samples(tokenizer, corpus, 12, seqlen, seed=5)
    assert random.getstate() == state
    assert torch.equal(samples, get_c4(tokenizer, read(corpus), 12, seqlen, seed=5))
    assert not torch.equal(samples, data.calibration_samples(tokenizer, corpus, 12, seqlen, seed=6))


@pytest.mark.parametrize("seqlen", [16, 700])
def test_calibration_behind_bos_is_get_c4_a_token_later(tokenizer, corpus, seqlen):
    """The same crops, each behind the token; one that begins with it is as it was."""
    texts, bos = read(corpus), tokenizer.bos_token_id
    expected = [
        [bos, *crop[:-1]] if crop[0] != bos else crop
        for crop in get_c4(tokenizer, texts, 12, seqlen, 5).tolist()
    ]
    assert data.calibration_samples(tokenizer, corpus, 12, seqlen, 5, bos).tolist() == expected


def test_calibration_keeps_to_documents_just_long_enough(tmp_path):
    # 3 and 4 tokens
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ww"}, {"text": "www www"}])
    assert data.calibration_samples(Words(), path, 5, 3, 0).tolist() == [[0, 3, 3]] * 5
    # begins with it
    assert data.calibration_samples(Words(), path, 5, 3, 0, bos=0).tolist() == [[0, 3, 3]] * 5
    with pytest.raises(
        UserError, match=r"none of the 2 documents .* more than 4 tokens: lower --seqlen"
    ):
        data.calibration_samples(Words(), path, 5, 4, 0)


# ------------------------------------------------------------------------------- perplexity windows


def test_windows_of_a_txt_are_the_file_as_it_is(tokenizer, tmp_path):
    text = "The cat\r\n\r\n\r\n" * 50 + "watches  the   child.\n"
    (tmp_path / "t.txt").write_bytes(text.encode("utf-8-sig"))  # some editors put a mark in front
    ids = tokenizer(text).input_ids
    windows = data.perplexity_windows(tokenizer, str(tmp_path / "t.txt"), 32)[0]
    assert windows.shape == (len(ids) // 32, 32)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert torch.equal(
        data.perplexity_windows(tokenizer, str(tmp_path / "t.txt"), 32, limit=2)[0], windows[:2]
    )


def test_windows_of_other_files_join_documents(tokenizer, corpus):
    ids = tokenizer("\n\n".join(read(corpus))).input_ids
    assert (
        data.perplexity_windows(tokenizer, corpus, 100)[0].flatten().tolist()
        == ids[: len(ids) // 100 * 100]
    )


def test_windows_refuse(corpus, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "w w w"}])  # 5 tokens
    assert data.perplexity_windows(Words(), path, 5)[0].shape == (1, 5)
    with pytest.raises(
        UserError, match="only 5 tokens, fewer than one window of 6: lower --seqlen"
    ):
        data.perplexity_windows(Words(), path, 6)[0]


# -------------------------------------------------------------------------------------- fingerprint


def test_fingerprint():
    batches = torch.arange(24).view(2, 3, 4)
    mark = hashlib.sha256(b"(2, 3, 4)" + struct.pack("<24q", *range(24))).hexdigest()[:16]
    assert mark == data.fingerprint(batches) == data.fingerprint(batches.to(torch.int32))
    # strides do not matter
    assert mark == data.fingerprint(batches.transpose(0, 1).contiguous().transpose(0, 1))
    assert (
        len({mark, *map(data.fingerprint, [batches.view(3, 2, 4), batches[:1], batches.flip(0)])})
        == 4
    )
