"""What the tests of evaluation share: models, a text and a quiz in one folder, and eval.py run on
them."""

import json
import shlex
import shutil
from pathlib import Path

import eval as evaluate

import transformers
from tiny import training_text

PLACE = "--dtype float32 --device cpu"


def hf_model(folder):
    """The model as transformers loads it, float32, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def write_lines(path, items: list) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def quiz() -> list[dict]:
    """Sentences to be finished, with four endings of unlike length; some contexts end in spaces,
    some are empty."""
    texts, items = training_text(), []
    for i in range(24):
        words = texts[i].split()
        cut = (0, 2, 3, 4)[i % 4] if i % 6 else 0
        endings = [
            " ".join(texts[4 * i + j].split()[cut + 1 :][: 1 + (i + j) % 5]) for j in range(4)
        ]
        context, space = " ".join(words[:cut]), " " if i % 5 else ""
        items.append(
            {
                "context": context + ("" if space else "  "),
                "choices": [space + ending for ending in endings],
                "gold": i * 7 % 4,
            }
        )
    return items


def make_folder(folder: Path, models: dict) -> Path:
    """A folder of the three models, a text, and the quiz as a file."""
    for name, path in models.items():
        shutil.copytree(path, folder / name)
    (folder / "text.txt").write_text(" ".join(training_text()[:60]))
    write_lines(folder / "quiz.jsonl", quiz())
    return folder


def run(arguments: str) -> None:
    evaluate.main(shlex.split(f"{PLACE} {arguments}"))


def table_of(said: str) -> list[list[str]]:
    """The cells of a Markdown table that was printed, row by row."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in said.splitlines()
        if line.startswith("|")
    ]
