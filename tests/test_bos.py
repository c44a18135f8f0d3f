"""A model that predicts text behind the beginning-of-text token and nonsense without it: what
learns, calibrates, judges and writes must put the token in front of it."""

import json
import random
from types import SimpleNamespace

import data
import eval as evaluate
import generate_text
import prune
import sparsify
from files import mask_files
from files.documents import documents
from masking.layers import apply_masks
from models.layers import find_layers
from models.loading import model_fingerprint
from models.loss import batch_loss, bos_hint
from utils import UserError

import pytest
import tiny
import torch
import transformers

PLACE = "--dtype float32 --device cpu"
HINT = "use --bos for this model: a beginning-of-text token lowers the loss of the first "


def needs_its_first_token(folder) -> str:
    """The tiny Llama, taught the sentences of tiny.py behind <s>, and to predict <unk> for ever
    without it."""
    tiny.make_llama(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generator = random.Random(3)
    ids = torch.tensor(
        [
            token
            for _ in range(60)
            for token in tokenizer(tiny.document(generator), add_special_tokens=False).input_ids
        ]
    )
    bos, unk = (
        torch.full((8, 1), tokenizer.bos_token_id),
        torch.full((8, 48), tokenizer.unk_token_id),
    )
    optimizer, starts = (
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        torch.Generator().manual_seed(0),
    )
    for _ in range(100):
        rows = torch.stack(
            [ids[i : i + 48] for i in torch.randint(len(ids) - 48, (8,), generator=starts)]
        )
        logits = model(
            input_ids=torch.cat([torch.cat([bos, rows[:, :-1]], 1), rows])
        ).logits.transpose(1, 2)
        loss = torch.nn.functional.cross_entropy(logits[:8], rows)
        optimizer.zero_grad()
        (loss + 0.1 * torch.nn.functional.cross_entropy(logits[8:], unk)).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, documents and one long text."""
    folder = tmp_path_factory.mktemp("bos")
    needs_its_first_token(folder / "model")
    tiny.write_corpus(folder / "text.jsonl", 24)
    generator = random.Random(11)
    (folder / "heldout.txt").write_text(" ".join(tiny.document(generator) for _ in range(4)))
    return folder


@pytest.fixture
def model(folder):
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def nats_behind(model, bos: int, windows: torch.Tensor) -> float:
    """Mean loss of all tokens of the windows but the first of each, window by window in float64,
    each read whole behind the token unless it begins with it."""
    total = 0.0
    for window in windows.tolist():
        read = window if window[0] == bos else [bos, *window]
        chances = model(input_ids=torch.tensor([read])).logits[0].detach().double().log_softmax(-1)
        behind = len(read) - len(window)
        total -= sum(float(chances[behind + i - 1, window[i]]) for i in range(1, len(window)))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


# ------------------------------------------------------------------------------------------ judging


def test_judging(folder, tmp_path, model, tokenizer, capsys):
    """Without the token all but the first window are nonsense, and a line says what to do; with it,
    the loss is the same tokens' by hand."""
    command = (
        f"--model {folder}/model {PLACE} --ppl {folder}/heldout.txt --seqlen 48 --nwindows 6 "
        f"--save {tmp_path}/"
    )
    evaluate.main(f"{command}plain.json".split())
    said = capsys.readouterr().out
    evaluate.main(f"{command}bos.json --bos".split())
    said_behind = capsys.readouterr().out
    plain, behind = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "bos")
    )
    ids = torch.tensor(tokenizer((folder / "heldout.txt").read_text()).input_ids)
    windows = ids[: 6 * 48].view(6, 48)
    assert (windows[:, 0] == 1).tolist() == [True] + [False] * 5  # the tokenizer's own token
    assert behind["nats"] == pytest.approx(nats_behind(model, 1, windows), abs=1e-5)
    assert plain["nats"] == pytest.approx(batch_loss(model, windows), abs=1e-5)
    assert behind["nats"] < 1.5 and plain["nats"] > 4
    assert (plain["bos"], behind["bos"]) == (False, True) and plain["fingerprint"] == behind[
        "fingerprint"
    ]
    # of the first that has none
    losses = batch_loss(model, windows[1:2]), nats_behind(model, 1, windows[1:2])
    assert f"{HINT}window without one from {losses[0]:.3f} to {losses[1]:.3f} nats\n" in said
    assert HINT not in said_behind and "6 windows of 48 tokens after BOS" in said_behind


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_judging_a_model_that_does_not_need_it(folder, models, kind, capsys):
    """No hint; and the token takes none of the model's positions, where they are learned."""
    command = (
        f"--model {models[kind]} {PLACE} --ppl {folder}/heldout.txt --save {{}} --seqlen "
        f"{tiny.POSITIONS}"
    )
    for number, flag in enumerate(("", " --bos")):
        evaluate.main((command.format(folder / f"{kind}{number}.json") + flag).split())
    assert HINT not in capsys.readouterr().out


def test_when_there_is_nothing_to_try(model, tokenizer):
    """A sequence of one token predicts none; one that begins with the token needs no other; a token
    that the model does not know is not put in front of it."""
    sequences = torch.arange(5, 13).view(1, 8)
    assert bos_hint(model, tokenizer, sequences, "window").startswith(HINT)
    assert bos_hint(model, tokenizer, sequences[:, :1], "window") is None
    assert (
        bos_hint(model, tokenizer, torch.cat([torch.ones(1, 1, dtype=int), sequences], 1), "window")
        is None
    )
    assert bos_hint(model, SimpleNamespace(bos_token_id=352), sequences, "window") is None
    with pytest.raises(UserError, match="token 352 but the model has only 352 embeddings"):
        batch_loss(model, sequences, bos=352)


# ---------------------------------------------------------------------------- calibrating, learning


def judged(folder, model, tokenizer) -> float:
    """Loss on the held-out text as the model is used, behind the token."""
    return nats_behind(
        model, 1, data.perplexity_windows(tokenizer, str(folder / "heldout.txt"), 48, 12)[0]
    )


def test_calibrating(folder, tmp_path, tokenizer, capsys):
    """What is pruned on text behind the token is better where it is used; without, a line says
    so."""
    found, said = {}, {}
    for name, flag in (("plain", ""), ("bos", "--bos")):
        prune.main(
            f"--model {folder}/model {PLACE} --dataset {folder}/text.jsonl --nsamples 16 --seqlen "
            "48 "
            f"--prune_method sparsegpt --save_model {tmp_path}/{name} {flag}".split()
        )
        said[name] = capsys.readouterr().out
        found[name] = judged(
            folder, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name), tokenizer
        )
    assert (
        f"{HINT}calibration sequence without one from " in said["plain"] and HINT not in said["bos"]
    )
    assert found["bos"] < found["plain"] - 1


def test_learning(folder, tmp_path, model, tokenizer, monkeypatch):
    """Of running text all rows, the held-out ones too, begin with the token, so that the loss is
    that of the model in use; what is learned from rows without it is no good there."""
    keep = torch.tensor([True, False, True, False])
    masks = {
        name: keep.repeat(layer.weight.numel() // 4).view_as(layer.weight)
        for name, layer in find_layers(model).items()
    }
    mask_files.save(tmp_path / "m0.safetensors", masks, 2, 4, "model", model_fingerprint(model))
    command = (
        f"--model {folder}/model {PLACE} --dataset {folder}/text.jsonl --mask "
        f"{tmp_path}/m0.safetensors --lr 1 --logits 1 --steps 28 --batchsize 4 --seqlen 48 "
        "--skip_checkpoint --out "
    )
    sparsify.main(f"{command}{tmp_path}/run".split())
    batches = data.token_sequences(tokenizer, [f"{folder}/text.jsonl"], 30 * 4 * 48, 4, 48, 0)
    assert (
        batches.shape == (30, 4, 48)
        and (batches[:, :, 0] == 1).all()
        and not (batches[:, :, 1:] == 1).any()
    )
    monkeypatch.setattr(data, "added_bos", lambda tokenizer: None)
    sparsify.main(f"{command}{tmp_path}/without".split())
    learned = {}
    for run in ("run", "without"):
        learned[run] = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        apply_masks(
            find_layers(learned[run]), mask_files.load(tmp_path / run / "mask.safetensors").masks
        )
    assert (
        judged(folder, learned["run"], tokenizer)
        < judged(folder, learned["without"], tokenizer) - 0.5
    )


# ------------------------------------------------------------------------------------------ writing


def test_writing(folder, tmp_path):
    """Documents begin behind the token, so that they are sentences."""
    generate_text.main(
        f"--model {folder}/model {PLACE} --tokens 400 --seqlen 48 --batchsize 8 "
        f"--out {tmp_path}/text.jsonl".split()
    )
    texts = list(documents(str(tmp_path / "text.jsonl")))
    known = {word.strip(".").lower() for text in tiny.training_text() for word in text.split()}
    words = [word.strip(".").lower() for text in texts for word in text.split()]
    assert sum(word in known for word in words) > len(words) / 2
