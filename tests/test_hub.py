"""data.py and the Hub, by what is asked of it and by what is made of its errors."""

from types import SimpleNamespace

import data
from files import hub as files_hub
from models.loading import load_model
from utils import UserError

import datasets
import pytest
import torch
from huggingface_hub import constants
from words import Words, get_c4

C4 = {
    "path": "allenai/c4",
    "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
    "split": "train",
}


@pytest.mark.parametrize(
    "dataset, arguments",
    [
        ("allenai/c4", C4),
        ("some/name", {"path": "some/name", "name": None, "split": "train"}),
        ("some/name:config", {"path": "some/name", "name": "config", "split": "train"}),
    ],
)
def test_hub_ids(dataset, arguments, hub):
    streamed = data.minibatches(Words(), dataset, 4, 2, 3)
    assert streamed[0, 1].tolist() == [0, 8, 1]
    drawn = data.calibration_samples(Words(), dataset, 8, 3, 0)
    assert torch.equal(drawn, get_c4(lambda text: Words()(text, False), hub.texts, 8, 3, 0))
    assert hub.asked == [{**arguments, "streaming": True, "verification_mode": "no_checks"}] * 2


def test_hub_perplexity_protocols(hub, tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    hub.texts = ["", " = Title = \n", "", " A line . \n"] * 20
    ids = tokenizer("\n\n".join(hub.texts)).input_ids
    windows = data.perplexity_windows(tokenizer, "wikitext2", 16)[0]
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert hub.asked[-1] == {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "split": "test",
        "streaming": True,
        "verification_mode": "no_checks",
    }
    hub.texts = [f"document {i}" for i in range(1200)]
    ids = tokenizer(" ".join(hub.texts[:1100])).input_ids
    assert data.perplexity_windows(tokenizer, "c4", 16)[0].flatten().tolist() == ids[: 256 * 16]
    windows = data.perplexity_windows(tokenizer, "c4", 64)[0]  # fewer than 256: all there are
    assert windows.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert data.perplexity_windows(tokenizer, "c4", 16, limit=3)[0].shape == (3, 16)
    assert hub.asked[-1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub.asked[-1]["split"] == "validation"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it on the Hub\n(LocalEntryNotFoundError)"),
        datasets.exceptions.DatasetNotFoundError(
            "Dataset doesn't exist on the Hub or cannot be accessed."
        ),
    ],
)
def test_hub_failures_are_one_line(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for use in (
        lambda: data.calibration_samples(Words(), "nobody/nothing", 4, 8, 0),
        lambda: data.perplexity_windows(Words(), "wikitext2", 8),
    ):
        with pytest.raises(UserError, match=r"^dataset .* cannot be read .* local file[^\n]*$"):
            use()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Then its libraries look in their cache alone, in place of half a minute of retries for each
    file."""
    asked = []

    def head(url, timeout):
        asked.append((url, timeout))
        raise OSError("no network")

    for is_there in (True, False):
        files_hub.answers.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        session = SimpleNamespace(
            head=(lambda url, timeout: asked.append(url)) if is_there else head
        )
        monkeypatch.setattr(files_hub, "get_session", lambda session=session: session)
        assert [files_hub.answers(), files_hub.answers()] == [is_there] * 2
        assert (not is_there) == constants.HF_HUB_OFFLINE
    assert asked == [constants.ENDPOINT, (constants.ENDPOINT, 5)]
    with pytest.raises(UserError, match="give the folder of a causal LM: the Hub does not answer"):
        load_model("some/model", device="cpu")
    files_hub.answers.cache_clear()


def test_what_is_wrong_with_a_model_of_the_hub_is_not_called_a_missing_folder(monkeypatch):
    """Only the libraries' errors may mean that there is no such model."""

    def quantised(*_: object) -> None:
        raise UserError("its weights are quantised")

    monkeypatch.setattr("models.loading.read_tokenizer", lambda *_: None)
    monkeypatch.setattr("models.loading.read_config", quantised)
    with pytest.raises(UserError) as told:
        load_model("some/model")
    assert str(told.value) == "--model some/model: its weights are quantised"
