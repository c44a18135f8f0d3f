import os
import shutil
from itertools import count

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # but in tests of the compiler, see `compiler`
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bench/gpu.py is for these

import train
from files import mask_files
from masking.compiler import compiled, eagerly
from masking.masked_model import MaskedModel
from models.layers import find_layers
from models.loading import model_fingerprint

import datasets
import hypothesis
import pytest
import tiny
import torch
import transformers
from faults import kill
from masked import magnitude_masks
from quizzes import hf_model, make_folder
from runs import VANILLA, arguments, raises, run_train
from torch.utils import collect_env

hypothesis.settings.register_profile("the same examples in every run", derandomize=True)
hypothesis.settings.load_profile("the same examples in every run")
# the harness asks at each evaluation, and it runs pip, which takes a second
collect_env.get_pretty_env_info = str


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
def compiler(monkeypatch):
    """torch.compile, which tests do without otherwise, with nothing compiled yet."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine: torch.compile cannot work")
    if "TORCH_COMPILE_DISABLE" in os.environ:
        pytest.skip("torch reads TORCH_COMPILE_DISABLE once: it cannot compile")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    compiled.cache_clear()
    torch._dynamo.reset()
    yield
    eagerly.clear()
    compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def load(models):
    """(kind, dtype) -> a fresh model, frozen and in eval mode."""

    def fresh(kind="llama", dtype=torch.float32):
        return (
            transformers.AutoModelForCausalLM.from_pretrained(models[kind])
            .to(dtype)
            .eval()
            .requires_grad_(False)
        )

    return fresh


@pytest.fixture(scope="session")
def text_and_masks(tmp_path_factory, models):
    """A text, and the Llama's magnitude masks of several N:M, for train.py."""
    folder = tmp_path_factory.mktemp("text_and_masks")
    tiny.write_corpus(folder / "text.jsonl", 12)
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    for n, m in ((1, 4), (2, 4), (4, 8), (8, 16)):
        masks = magnitude_masks(find_layers(model), n, m)
        mask_files.save(
            folder / f"{n}_{m}.safetensors", masks, n, m, "llama", model_fingerprint(model)
        )
    return folder


@pytest.fixture
def learn(text_and_masks, models, tmp_path):
    """Flags -> a run of train.py, as `runs.run_train` has it."""
    number = count()
    return lambda flags: run_train(
        tmp_path / f"run{next(number)}", text_and_masks, models["llama"], flags
    )


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """That of tests/faults/kill.py."""
    folder = tmp_path_factory.mktemp("workshop")
    kill.workshop(folder)
    return folder


@pytest.fixture
def losses(monkeypatch):
    """step -> what the loss of that step is instead (a function of no argument); counts the forward
    passes of steps, of which --estimator vanilla makes one each, and of held-out minibatches."""
    said, passes, true = {}, count(1), MaskedModel.loss

    def loss(*given):
        number = next(passes)
        return said[number]() if number in said else true(*given)

    monkeypatch.setattr(MaskedModel, "loss", loss)
    return said


@pytest.fixture
def stopped(workshop, tmp_path, losses):
    """A run that stopped after three steps."""
    losses[4] = raises(MemoryError())
    with pytest.raises(MemoryError):
        train.main(arguments(workshop, tmp_path / "run", VANILLA))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    """The models, a text and a quiz, for eval.py."""
    return make_folder(tmp_path_factory.mktemp("evaluate"), models)


@pytest.fixture(params=list(tiny.MODELS))
def loaded(request, folder):
    """Each of these models with its tokenizer."""
    return hf_model(folder / request.param)


@pytest.fixture
def nothing_loads(monkeypatch):
    """A model that eval.py loads is a failure."""

    def load_model(*given):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("eval.load_model", load_model)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """SentencePiece that starts with <s>; byte-level that starts with </s>, that adds nothing, that
    ends with </s>."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.save_sentencepiece(folder / "sentencepiece")
    tiny.save_bytelevel(
        folder / "opt",
        ["<s>", "<pad>", "</s>", "<unk>"],
        start="</s>",
        bos_token="</s>",
        eos_token="</s>",
    )
    tiny.save_bytelevel(folder / "gpt2", ["<|endoftext|>"], start=None, bos_token="<|endoftext|>")
    tiny.save_bytelevel(
        folder / "ended", ["<s>", "</s>"], start=None, end="</s>", bos_token="<s>", eos_token="</s>"
    )
    return {
        name: transformers.AutoTokenizer.from_pretrained(folder / name)
        for name in ("sentencepiece", "opt", "gpt2", "ended")
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: notes what is asked of it and answers with the texts, or the columns,
    it is given."""

    class Hub:
        def __init__(self):
            self.texts, self.columns, self.asked = [f"document {i}" for i in range(1200)], None, []

        def load_dataset(self, path, **arguments):
            self.asked.append({"path": path, **arguments})
            columns = self.columns or {"text": self.texts, "url": ["https://"] * len(self.texts)}
            rows = datasets.Dataset.from_dict(columns)
            return rows.to_iterable_dataset() if arguments.get("streaming") else rows

    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    return stand_in
