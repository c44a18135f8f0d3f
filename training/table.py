"""The table of a run of sparsify.py: losses of masks on texts, and samples of what the models
write."""

from pathlib import Path

import data
from evaluation.perplexity import evaluate_windows
from masking.masked_model import MaskedModel
from models import generation
from models.loading import Tokenizer, positions
from training.defaults import WINDOW, WINDOWS
from training.run_folder import RunFolder

from torch import Tensor, nn

PROMPT = 16  # tokens of held-out text that the models continue
SAMPLE = 30  # tokens that they write, at most


def read_windows(model: nn.Module, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """Return the first WINDOWS windows of each text, by file or dataset name, int64 `[windows,
    tokens]`."""
    window = min(WINDOW, positions(model))
    return {
        Path(text).name: data.perplexity_windows(tokenizer, text, window, WINDOWS)[0]
        for text in texts
    }


class Table:
    """Evaluates masks on held-out minibatches, int64 `[minibatches, sequences, tokens]`, and on
    windows of further texts, and adds the losses to the run's record."""

    def __init__(
        self, folder: RunFolder, tokenizer: Tokenizer, unseen: Tensor, windows: dict[str, Tensor]
    ):
        self.folder = folder
        self.tokenizer = tokenizer
        self.unseen = unseen
        self.windows = windows
        self.prompt = unseen[0, 0, :PROMPT]

    def add(self, name: str, masked: MaskedModel) -> None:
        """Record the row of the mask in use: text -> loss in nats."""
        bos = data.added_bos(self.tokenizer)
        suffix = "" if bos is None else " after BOS"
        row = {"held-out text": masked.mean_loss(self.unseen)}
        for text, windows in self.windows.items():
            row[f"{text}{suffix}"] = evaluate_windows(masked.model, windows, bos)["nats"]
        self.folder.note(nats={**self.folder.record.get("nats", {}), name: row})

    def write(self, name: str, model: nn.Module) -> None:
        """Record how the model continues the prompt, unless the record has it."""
        sample = self.folder.record.get("sample", {})
        if name in sample:
            return
        prompt = self.tokenizer.decode(self.prompt, skip_special_tokens=True)
        text = generation.continuation(model, self.tokenizer, self.prompt, SAMPLE)
        self.folder.note(sample={**sample, "prompt": prompt, name: text})
