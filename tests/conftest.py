import pytest
import tiny
import torch
import transformers
from quizzes import make_folder


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: threads would only wait for each other, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of the tiny Llama, GPT-2 and OPT, by kind: to be read or copied, never written to."""
    root = tmp_path_factory.mktemp("models")
    return {kind: make(root / kind) for kind, make in tiny.MODELS.items()}


@pytest.fixture
def load(models):
    """(kind, dtype) -> a fresh model, frozen and in eval mode."""
    def fresh(kind="llama", dtype=torch.float32):
        return transformers.AutoModelForCausalLM.from_pretrained(models[kind]).to(dtype).eval().requires_grad_(False)
    return fresh


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    """The models, a text and a quiz, for evaluate.py."""
    return make_folder(tmp_path_factory.mktemp("evaluate"), models)


@pytest.fixture
def nothing_loads(monkeypatch):
    """A model that evaluate.py loads is a failure."""
    def load_model(**given):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr("evaluate.load_model", load_model)
