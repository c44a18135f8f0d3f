"""README and docs say what is there: links and anchors exist, files that are named exist, commands
parse. The README's are run, one after the other as they stand, on a tiny model in place of theirs,
for two steps."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import train
from files.documents import documents

import pytest
from quizzes import quiz, write_lines
from runs import ROOT, SCRIPTS
from tiny import write_corpus

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|json|txt|toml)|(?:[\w-]+/)+)`")
# by users and runs, not by us
MADE = re.compile(
    r"(results|demo|out|RUN|checkpoint|state|tensorboard|.*\.venv)/|"
    r"(text|quiz|data|generated|.*evaluation|prune|run|config|adapter_config|other|report)\.(jsonl?|txt)$"
)
FEWER = {  # what is put behind a command, of which the last value of a flag counts
    "prune": "--model {model} --dataset text.jsonl --nsamples 2 --seqlen 32 --dtype float32",
    "inference_loss": (
        "--model {model} --dataset text.jsonl --dataset_size 8 --batchsize 4 --seqlen 32"
    ),
    "train": (
        "--model {model} --dataset text.jsonl --dataset_size 8 --batchsize 4 --seqlen 32 "
        "--max_step 2"
    ),
    "sparsify": "--seqlen 32 --batchsize 4 --steps 2 --dtype float32",
    "eval": "--ppl text.txt --seqlen 32 --nwindows 4",
}


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make, as GitHub makes them."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#+ (.*)", line):
            plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def commands(page: Path) -> list[list[str]]:
    """The shell commands in a page's code blocks, as words; comments left out."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    starts = (
        "python ",
        "torchrun ",
        "bash ",
        "make ",
        "pip ",
        "DEMO=",
        "DRY=",
        "HELDOUT=",
        "SMALL=",
    )
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in (
        target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target
    ):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), (
                f"{page.name} links to {target}; there are {sorted(anchors(file))}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    for name in PATH.findall(page.read_text(encoding="utf-8")):
        assert any((ROOT / room / name).exists() for room in ("", "reproduce")) or MADE.match(
            name
        ), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_scripts_parse(page):
    for words in commands(page):
        # None: python -m pip
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if words[0] not in ("python", "torchrun") or "..." in words or place is None:
            continue
        assert (ROOT / words[place]).is_file(), " ".join(words)
        name, flags = words[place].removesuffix(".py").replace("/", "."), words[place + 1 :]
        # there is no such run
        flags = ["--model" if flag == "--resume" else flag for flag in flags]
        if name == "train":
            train.parse_args(flags)
        elif name in SCRIPTS:
            import_module(name).parse_args(flags)
        elif name.startswith("tests.faults."):
            import_module(name.removeprefix("tests.")).parse_args(flags)
        else:
            assert name.startswith(("bench.", "reproduce.")), " ".join(words)


def test_commands_of_the_benches_parse():
    wanted = [
        [Path(words[1]).stem, words[2:]]
        for page in PAGES
        for words in commands(page)
        if words[0] == "python" and words[1].startswith("bench/")
    ]
    shown = [
        [Path(words[0]).stem, words[1:]]
        for page in PAGES
        for words in map(
            shlex.split,
            re.findall(r"`python (bench/[^`\n]+(?:\n[^`\n]+)?)`", page.read_text(encoding="utf-8")),
        )
    ]
    assert wanted or shown
    for name, flags in wanted + shown:
        import_module(name).parse_args(flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_commands_are_there(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        assert words[0] != "make" or words[1] in targets
        assert words[0] != "bash" or (ROOT / words[1]).is_file(), words


def test_the_readme_is_read_and_its_commands_run(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "passages.txt"):
        Path(name).write_text(
            "\n\n".join(documents(str(write_corpus(tmp_path / "text.jsonl", 40))))
        )
    write_lines(Path("questions.jsonl"), quiz())
    ran, runs = [], []
    for program, script, *flags in commands(PAGES[0]):
        if program != "python" or "/" in script:
            continue
        ran.append(script.removesuffix(".py"))
        more = FEWER.get(ran[-1], "").format(model=models["llama"]).split()
        import_module(ran[-1]).main(
            [str(models["llama"]) if flag == "MODEL" else flag for flag in flags + more]
        )
        runs += re.findall(r"-> (results/[\w./-]+)$", capsys.readouterr().out, re.MULTILINE)
    assert ran == ["sparsify"] * 4 + ["prune", "get_mask", "inference_loss", "train", "eval"] + [
        "prune",
        "get_mask",
        "train",
        "eval",
    ]
    assert len(runs) == 6 and all(Path(run, "mask.safetensors").is_file() for run in runs)
    assert len(list(Path("results/evaluations").iterdir())) == 2
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 130
