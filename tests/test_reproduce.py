"""The scripts of reproduce/: the scripts that they name parse their commands, and one of them runs
on a tiny model.

Its commands, printed by DRY=1, run in this process, which saves them a process each; the rest runs
as a user runs it.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eval as evaluate
import pge
import train
from files.documents import documents
from masking.layers import apply_masks
from models.layers import find_layers
from models.loading import load_model, model_fingerprint
from models.loss import batch_loss
from utils import UserError

import pytest
import torch
from exact import exact_vjp
from masked import drawn_masks, logits_of, make, patch_file, seeded
from runs import ROOT, SCRIPTS
from tiny import write_corpus

sys.path.insert(0, str(ROOT / "reproduce"))
import after
import real_text
import record
import rival
import tables
import variance

REPRODUCE = {"after": after, "record": record, "rival": rival}
COMMANDS = {f"reproduce/{name}.py": script for name, script in REPRODUCE.items()} | {
    f"{name}.py": script for name, script in SCRIPTS.items()
}
EXPERIMENTS = sorted(file.stem for file in ROOT.glob("reproduce/*.sh") if file.stem != "common")
SHARED = {
    "baselines": "cached",
    "dataset_size": "8",
    "estimators": "maskpro",
    "learning_rate": "50",
    "logits": "10",
    # VALUES with which a script has no rows but those of llama2_7b_2of4
    "llama2_7b_2of4": "",
}
RUN = "maskpro-size8-lr50-logits10-steps2"
SETTINGS = dict(
    DEMO="1",
    DTYPE="float32",
    NSAMPLES="4",
    CALIBRATION_SEQLEN="48",
    SEQLEN="64",
    NWINDOWS="4",
    SQLEN="32",
    SIZE="8",
    BATCHSIZE="4",
    STEPS="2",
)


def bash(script: str, settings: dict, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script of reproduce/ from `folder` under these settings."""
    known = {
        key: os.environ[key]
        for key in ("PATH", "HOME", "TMPDIR", "CUDA_VISIBLE_DEVICES")
        if key in os.environ
    }
    return subprocess.run(
        ["bash", ROOT / f"reproduce/{script}.sh"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **known,
            "PYTHON": sys.executable,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            **settings,
        },
    )


def printed(said: str) -> list[list[str]]:
    """The commands that a script shows, each a list: script and flags."""
    return [
        shlex.split(line.removeprefix("$ python "))
        for line in said.splitlines()
        if line.startswith("$ python ")
    ]


def parse(name: str, flags: list[str]):
    if name == "train.py":
        return train.parse_args(flags)
    return COMMANDS[name].parse_args(flags)


def planned(script: str, settings: dict, folder: Path = ROOT) -> list[list[str]]:
    done = bash(script, {**settings, "DRY": "1"}, folder)
    assert done.returncode == 0, done.stderr
    assert len(printed(done.stdout)) == len(done.stdout.splitlines())
    return printed(done.stdout)


def trained(plan: list[list[str]]) -> list:
    """The arguments of the runs."""
    return [parse(name, flags) for name, *flags in plan if name in ("train.py", "sparsify.py")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models):
    """llama2_7b_2of4.sh on a tiny model, of which all commands but the table's have run:
    `settings`, `out`, `root`."""
    root = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(models["llama"], root / "dense")
    write_corpus(root / "text.jsonl", 16)
    (root / "held_out.txt").write_text(
        "\n\n".join(documents(write_corpus(root / "other.jsonl", 4, seed=7)))
    )
    paths = dict(MODEL="dense", TRAIN_TEXT="text.jsonl", HELDOUT="held_out.txt", OUT="out")
    settings = {**SETTINGS, **{key: str(root / name) for key, name in paths.items()}}
    for name, *flags in planned("llama2_7b_2of4", settings)[:-1]:
        COMMANDS[name].main(flags)
    return SimpleNamespace(settings=settings, out=root / "out", root=root)


@pytest.mark.parametrize(
    "mode, rows",
    [
        ({}, "after both real roi"),
        ({"DEMO": "1"}, "one_shot maskpro prior scores scores_prior"),
        ({"SMALL": "1"}, "both minutes minutes_permuted scores_ste maskllm"),
    ],
    ids=["paper", "demo", "small"],
)
@pytest.mark.parametrize("script", EXPERIMENTS)
def test_the_scripts_take_the_commands(script, mode, rows, tmp_path):
    """Of smollm2.sh, which has one mode, these rows."""
    further = {"HELDOUT": "text.txt", "VALUES": rows, "QUESTIONS": "quiz.jsonl"}
    plan = planned(
        script,
        {
            **mode,
            "OUT": str(tmp_path / "out"),
            "MODEL": str(tmp_path),
            **(further if script == "smollm2" else {}),
            "PUBLIC": __file__,  # there is such a file
        },
        folder=tmp_path,
    )
    parsed = [(name, parse(name, flags)) for name, *flags in plan]
    assert not (tmp_path / "out").exists()
    outputs = [
        vars(args).get("save_model") or vars(args).get("out") or args.save
        for _, args in parsed[:-1]
    ]
    assert len(set(outputs)) == len(outputs)  # nothing twice
    if mode.get("SMALL") or script in ("after", "smollm2"):
        assert parsed[-1][1].folder == str(tmp_path / "out")
    else:
        assert parsed[-1][1].compare == [
            args.save for name, args in parsed[:-1] if name == "eval.py"
        ]


def test_the_papers_settings(tmp_path):
    plan = planned("llama2_7b_2of4", {"OUT": str(tmp_path / "out")})
    paper, ours = trained(plan)
    assert (
        paper.model == "meta-llama/Llama-2-7b-hf"
        and paper.dtype == "float16"
        and paper.dataset == "allenai/c4"
    )
    assert (
        paper.estimator,
        paper.dataset_size,
        paper.batchsize,
        paper.seqlen,
        paper.lr,
        paper.logits,
    ) == ("maskpro", 512, 32, 128, 50, 10)
    assert (ours.model, ours.mask, ours.dataset, ours.steps) == (
        paper.model,
        paper.mask,
        [paper.dataset],
        10000,
    )
    evaluated = [evaluate.parse_args(flags) for name, *flags in plan[:-1] if name == "eval.py"]
    assert {(args.ppl, args.seqlen, len(args.tasks)) for args in evaluated} == {
        ("wikitext2", 4096, 7)
    }


def test_a_public_mask_is_fetched_and_stands_beside_ours(finished, tmp_path):
    settings = {**finished.settings, "OUT": str(tmp_path / "out"), "VALUES": "2 3"}
    fetched = planned("public_mask", {**settings, "PUBLIC": "some/repository"})
    hub = ["-m", "huggingface_hub.cli.hf", "download", "some/repository", "mask.npz"]
    assert [command for command in fetched if command[0] == "-m"] == [
        [*hub, "--local-dir", f"{tmp_path}/out/public"]
    ]
    wanda = load_model(str(finished.out / "2of4/wanda"), "float32", "cpu")[0]
    public = patch_file(tmp_path / "mask.npz", wanda.state_dict())
    for name, *flags in planned("public_mask", {**settings, "PUBLIC": str(public)}):
        COMMANDS[name].main(flags)
    records = {
        name: json.loads((tmp_path / f"out/{name}.json").read_text())
        for name in ("dense", "2of4/wanda", "2of4/public", "2of4/sparsify-steps3")
    }
    assert records["2of4/public"]["ppl"] == records["2of4/wanda"]["ppl"]
    assert records["2of4/public"]["ppl"] != records["dense"]["ppl"]


def test_a_record_and_its_table_are_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "text").write_text("a text")
    nats = {
        "dense": 1.0,
        "1of4/wanda": 2.0,
        "1of4/run": 1.5,
        "1of4/run-seed1": 1.25,
        "1of4/run-seed12": 1.75,
    }
    for number, (name, loss) in enumerate(nats.items()):
        (tmp_path / f"out/{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"out/{name}.json").write_text(
            json.dumps(
                {
                    "nats": loss,
                    "ppl": 2**loss,
                    "model": ".",
                    **dict.fromkeys(
                        ("text", "windows", "seqlen", "dtype", "fingerprint", "environment"), "text"
                    ),
                }
            )
        )
        if "run" in name:
            run = tmp_path / f"out/{name}"
            run.mkdir()
            (run / "run.json").write_text(
                json.dumps(
                    {
                        "arguments": {"dataset": "text", "seed": number - 2},
                        "environment": {},
                        "fingerprints": {},
                        "summary": {"blocks": 200, "blocks_changed": number},
                    }
                )
            )
            (run / "metrics.jsonl").write_text(
                "".join(
                    json.dumps({"loss": (step < record.STEPS) + number, "seconds": 60}) + "\n"
                    for step in range(1500)
                )
            )
    record.main(["out"])
    dense, run, wanda = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]
    assert dense == ["1", "1.0000", *[""] * 5] and wanda == ["1", "2.0000", *[""] * 5]
    assert run == [
        "3",
        "1.5000 ± 0.2500",
        "50.0 ± 25.0",
        "4.0000 ± 1.0000",
        "3.0000 ± 1.0000",
        "1.50 ± 0.50",
        "60 ± 0",
    ]
    kept = json.loads((tmp_path / "out/record.json").read_text())
    assert kept["sha256"] == {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "text")
    }
    curve = kept["rows"]["1of4/run"][0]["run"]["curve"]
    assert (curve[0], curve[-1], len(curve)) == (3.0, 2.0, record.POINTS)
    # its seed 1 is on record alone
    (tmp_path / "out/1of4/run-seed1.json").rename(tmp_path / "out/1of4/other.json")
    with pytest.raises(UserError, match=r"out/record\.json exists already"):
        record.main(["out/1of4/run", "--out", "out/record.json"])
    record.main(["out", "--out", "out/record.json"])
    grown = json.loads((tmp_path / "out/record.json").read_text())["rows"]
    assert grown["1of4/run"] == kept["rows"]["1of4/run"] and grown["1of4/other"][0]["nats"] == 1.25
    (tmp_path / "text").write_text("another text")
    with pytest.raises(UserError, match="text is not the one of that record"):
        record.main(["out", "--out", "out/record.json"])
    wanda = tmp_path / "out/1of4/wanda.json"
    wanda.write_text(wanda.read_text().replace('"fingerprint": "text"', '"fingerprint": "another"'))
    with pytest.raises(
        UserError, match=r"wanda\.json was evaluated on other tokens or items than dense\.json"
    ):
        record.main(["out"])


def test_the_docs_say_what_the_records_say(tmp_path, monkeypatch):
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert tables.rendered(text) == text, (
            f"{page} is other than the records: run python reproduce/tables.py"
        )
    falsified = text.replace("| small |", "| large |")
    assert falsified != text and tables.rendered(falsified) == text


@pytest.mark.parametrize("script", SHARED)
def test_what_a_script_has_made_others_take(script, finished):
    (command,) = planned(script, {**finished.settings, "VALUES": SHARED[script]})
    assert command[:2] == ["eval.py", "--compare"] and all(
        Path(record).is_file() for record in command[2:]
    )


def test_an_interrupted_script_goes_on(finished):
    record = finished.out / f"2of4/{RUN}.json"
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.out.rglob("*")
        if path.is_file() and path != record
    }
    record.unlink()
    done = bash("llama2_7b_2of4", finished.settings, folder=finished.root)
    assert done.returncode == 0, done.stderr
    assert [command[0] for command in printed(done.stdout)] == ["eval.py"] * 2 and record.is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    table = (finished.out / "llama2_7b_2of4/table.md").read_text()
    assert done.stdout.endswith(table) and table.count("\n") == 2 + 6
    assert all(f"2of4/{run} | 2:4 | 0.5" in table for run in (RUN, "sparsify-steps2"))


def test_a_run_that_stopped_goes_on(finished):
    """A folder that is no run stops the script."""
    run = finished.out / "2of4" / RUN.replace("lr50", "lr77")
    run.mkdir()
    done = bash("learning_rate", {**finished.settings, "VALUES": "77"})
    run.rmdir()
    assert printed(done.stdout) == [["train.py", "--resume", str(run)]]
    assert done.returncode == 2 and run.name in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("dtype, within", [("float32", 1e-3), ("bfloat16", 0.02)])
def test_the_small_model_is_the_one_that_was_made(dtype, within):
    folder = ROOT / "reproduce/small_model"
    (made,) = json.loads((folder / "made.json").read_text())
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == made["sha256"]
    model, tokenizer = load_model(str(folder), dtype, "cpu")
    text = (
        "The commerce of the United States with the other nations has continued to increase, and "
        "revenue is ample."
    )
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert batch_loss(model, tokens) == pytest.approx(0.7849, abs=within)
    rows = tokens.repeat(9, 1)  # summed in float32
    assert batch_loss(model, rows) == pytest.approx(
        float(model(input_ids=rows, labels=rows).loss), abs=1e-5
    )
    assert model_fingerprint(model) == "064a3a59c4155d35"  # by which published masks know it


def test_signal_and_noise_are_those_of_plain_autograd(load):
    """Of the same draws: E |X|^2 of each advantage, and |g|^2 from the products of the means of
    different groups."""
    batches, groups, first = torch.randint(32, (2, 2, 20), generator=seeded(0)), variance.GROUPS, 8
    found = variance.measure(
        make(load(), magnitude=2.0, keep_dense=True)[0], batches, samples=2 * groups
    )
    masked, m0, dense = make(load(), magnitude=2.0)

    def under(masks, batch):
        """Loss, and its gradient in the masked weights."""
        plain = load()
        layers = find_layers(plain)
        apply_masks(layers, masks)
        weights = [layer.weight.requires_grad_() for layer in layers.values()]
        loss = plain(input_ids=batch, labels=batch).loss
        return loss.item(), torch.autograd.grad(loss, weights)

    draws, delta = [], 0.0
    for number in range(-first, 2 * groups):
        masked.update(0.0)
        masked.flush()
        masks, batch = drawn_masks(masked), batches[number % 2]
        loss, gradients = under(masks, batch)
        residual = loss - under(m0, batch)[0]
        if number < 0:
            delta += residual / first
            continue
        masked.steps += 1  # as a step counts
        blocks = [
            (logits_of(layer), masks[name].view(-1, 4)) for name, layer in masked.layers.items()
        ]
        saliency = [
            (dense[name] * gradient).double().view(-1, 4)
            for name, gradient in zip(masks, gradients)
        ]
        draws.append(
            (
                loss,
                residual,
                sum(float(pge.score(*pair).square().sum()) for pair in blocks),
                torch.cat(
                    [exact_vjp(logits, 2, g).flatten() for (logits, _), g in zip(blocks, saliency)]
                ),
            )
        )
    for name, moments in {
        "vanilla": [loss**2 * square for loss, _, square, _ in draws],
        "residual": [residual**2 * square for _, residual, square, _ in draws],
        "maskpro": [(residual - delta) ** 2 * square for _, residual, square, _ in draws],
    }.items():
        assert found["second_moment"][name] == pytest.approx(sum(moments) / len(draws), rel=1e-3)
    means = [(draws[group][3] + draws[group + groups][3]) / 2 for group in range(groups)]
    pairs = [float(a @ b) for i, a in enumerate(means) for b in means[:i]]
    assert found["signal"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-3)


def test_the_error_of_a_mean_product_is_its_deviation():
    """Over 2,000 tries; where there is nothing to see, it is too large."""
    for mean, most in ((1.0, 1.2), (0.0, 1.8)):
        groups = mean + torch.randn(2000, variance.GROUPS, 5, generator=seeded(0))
        products, errors = torch.tensor([variance.mean_product(means) for means in groups]).T
        assert float(products.mean()) == pytest.approx(
            5 * mean**2, abs=4 * float(products.std()) / 2000**0.5
        )
        assert 0.9 < float(errors.square().mean().sqrt() / products.std()) < most


def test_real_text_is_plain_and_keeps_some_excerpts_back(tmp_path):
    (tmp_path / "brown").mkdir()
    for number in range(1, 17):
        for genre in "ab":
            (tmp_path / f"brown/c{genre}{number:02}").write_text(
                f"\n\n\tExcerpt/nn-tl {genre}{number}/cd ,/, ``/`` it's/pps+bez and/or/cc ''/'' "
                f"(/( so/rb )/) ./.\nMore/ap ./.\n\n\n\tLast/ap ?/.\n"
            )
    (tmp_path / "essays/html").mkdir(parents=True)
    (tmp_path / "essays/html/page.html").write_text(
        f"<h1>Title</h1><p>See <a>this</a></p>\n<p>A {'long ' * 20}<i>&amp;\n plain</i></p>"
    )
    real_text.main([str(tmp_path / "brown"), str(tmp_path / "essays"), "--out", f"{tmp_path}/out"])
    learned = list(documents(tmp_path / "out/brown.jsonl"))
    unseen = (tmp_path / "out/brown-unseen.txt").read_text().split("\n\n")
    assert learned[0] == 'Excerpt a1, "it\'s and/or" (so). More.\nLast?'
    assert [text.split(",")[0][-2:] for text in unseen] == ["a7", "15", "b7", "15"]
    assert len(learned) == 12 and not any(text in learned for text in unseen)
    assert list(documents(tmp_path / "out/essays.jsonl")) == [f"A {'long ' * 20}& plain"]
    assert set(json.loads((tmp_path / "out/sources.json").read_text())) == {"brown", "essays"}


def test_real_text_says_which_folder_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no files ca01 to cr09"):
        real_text.main([str(tmp_path), str(tmp_path), "--out", f"{tmp_path}/out"])
