"""The README's commands, run one after the other as they stand, on a tiny model in place of theirs, for two steps."""
import re
import shlex
from pathlib import Path

import eval as evaluate
import get_mask
import inference_loss
import prune
import sparsify
import train
from files.documents import documents

from quizzes import quiz, write_lines
from tiny import write_corpus

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"prune.py": prune, "get_mask.py": get_mask, "inference_loss.py": inference_loss, "train.py": train,
           "sparsify.py": sparsify, "eval.py": evaluate}
FEWER = {  # what is put behind a command, of which the last value of a flag counts
    "prune.py": "--model {model} --dataset text.jsonl --nsamples 2 --seqlen 32 --dtype float32",
    "inference_loss.py": "--model {model} --dataset text.jsonl --dataset_size 8 --batchsize 4 --seqlen 32",
    "train.py": "--model {model} --dataset text.jsonl --dataset_size 8 --batchsize 4 --seqlen 32 --max_step 2",
    "sparsify.py": "--seqlen 32 --batchsize 4 --steps 2 --dtype float32", "eval.py": "--ppl text.txt --seqlen 32"}


def test_the_commands_run(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "passages.txt"):
        Path(name).write_text("\n\n".join(documents(str(write_corpus(tmp_path / "text.jsonl", 40)))))
    write_lines(Path("questions.jsonl"), quiz())
    ran, runs = [], []
    for line in re.findall(r"^    python (\w+\.py .*)$", re.sub(r"\\\n\s*", "", README), re.MULTILINE):
        script, *flags = shlex.split(line, comments=True)
        more = shlex.split(FEWER.get(script, "").format(model=models["llama"]))
        SCRIPTS[script].main([str(models["llama"]) if flag == "MODEL" else flag for flag in flags + more])
        runs += re.findall(r"-> (results/[\w./-]+)$", capsys.readouterr().out, re.MULTILINE)
        ran.append(script)
    assert ran == ["sparsify.py"] * 4 + ["prune.py", "get_mask.py", "inference_loss.py", "train.py", "eval.py"] + [
        "prune.py", "get_mask.py", "train.py", "eval.py"]
    assert len(runs) == 6 and all(Path(run, "mask.safetensors").is_file() for run in runs)
    assert len(list(Path("results/evaluations").iterdir())) == 2
