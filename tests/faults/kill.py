"""Kill runs at random moments, resume them, and compare every bit with the run that was left alone.

    python tests/faults/kill.py [--kills 24] [--seed 0]

Every row is one way of learning on a model of two layers (tests/tiny.py, made on the spot). A run
is killed by SIGKILL, SIGTERM or SIGINT inside a random module's forward pass, or by SIGKILL between
two chunks of a state that is being written, or before a sync, a rename or a removal. After some of
the kills the newest state is torn or a bit of it flipped, as a power failure may do. Then it is
resumed, and maybe killed again, until it ends. `same` counts the runs whose masks, logits, metrics,
layers and curve are those of the uninterrupted run, bit for bit (all but the seconds).

The killers are put into the process from here; the scripts know nothing of them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

if not __package__:  # run as a command
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
import sparsify
import train
import utils
from evaluation.comparison import markdown_table
from files import mask_files
from models.layers import find_layers
from models.loading import load_model, model_fingerprint
from training import checkpoint

import masked
import tiny

COMMON = "--dtype float32 --device cpu --seqlen 24 --batchsize 2 --checkpoint_every 2"
PAPER = "--dataset_size 8 --logits 1 --max_step 8 --save"
DEBIASED = (
    "--lr 5 --debias_tracker --baseline online --logits_dtype float16 --val_fraction 0.25 "
    "--skip_checkpoint"
)
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
RUNS = {  # name -> script, flags
    "maskpro": (train, f"{PAPER} --lr 5 --baseline online --skip_checkpoint"),
    "sparsify": (sparsify, "--steps 8"),
    "pattern space": (train, f"{PAPER} --lr 5 --space pattern --baseline online --skip_checkpoint"),
    "debiased, float16 logits": (train, f"{PAPER} {DEBIASED}"),
}


def workshop(folder: Path) -> None:
    """A model, a text and m0, made once."""
    tiny.make_llama(folder / "dense")
    tiny.write_corpus(folder / "text.jsonl", 12)
    model = load_model(f"{folder}/dense", dtype="float32", device="cpu")[0]
    masks = masked.magnitude_masks(find_layers(model), 2, 4)
    mask_files.save(folder / "mask.safetensors", masks, 2, 4, "dense", model_fingerprint(model))


class Killer:
    """Counts moments of this process, and at the one that `kind` and `number` name sends it a
    signal."""

    def __init__(self, kind: str, number: int, sent: int):
        self.kind, self.number, self.sent, self.counts = kind, number, sent, Counter()
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: self.moment("forward")
        )
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, self.before(getattr(os, name), "file"))
        checkpoint.open = self.counting

    def moment(self, kind: str) -> None:
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.number:
            os.kill(os.getpid(), self.sent)

    def before(self, function, kind: str):
        def called(*arguments, **names):
            self.moment(kind)
            return function(*arguments, **names)

        return called

    @contextmanager
    def counting(self, *named):
        """A file whose writes are moments."""
        with open(*named, buffering=0) as file:
            yield SimpleNamespace(write=self.before(file.write, "chunk"), flush=file.flush)


def in_process(
    folder: Path, arguments: list[str], kind: str = "", number: int = 0, sent: int = 0, script=train
) -> tuple[int, str]:
    """A script with a killer in a process of its own; its exit code (-9: SIGKILL), and what it
    said."""
    log = folder / "said.txt"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
                os.environ.update(TOKENIZERS_PARALLELISM="false", TORCHDYNAMO_DISABLE="1")
                torch.set_num_threads(1)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                killer = Killer(kind, number, sent)
                utils.run_script(lambda: script.main(arguments))
            code = 0
            (folder / "counts.json").write_text(json.dumps(killer.counts))
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:  # outside of the loop; python itself then ends as a shell has it
            code = 128 + signal.SIGINT
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def contents(run: Path) -> dict:
    """What a finished run made: everything but times and places."""
    record = json.loads((run / "run.json").read_text())
    assert not list(run.glob(".*")) and not (run / "state").exists() and not (run / "lock").exists()
    found = {
        path.relative_to(run): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
        and path.suffix != ".safetensors"
        and path.name not in ("run.json", "report.json", "metrics.jsonl")
    }
    for path in run.rglob("*.safetensors"):  # whose metadata come in any order
        found.update(
            {
                f"{path.name} {name}": (
                    tensor.dtype,
                    tensor.shape,
                    tensor.view(torch.uint8).numpy().tobytes(),
                )
                for name, tensor in load_file(path).items()
            }
        )
    found["metrics"] = [
        {**json.loads(line), "seconds": 0} for line in (run / "metrics.jsonl").open()
    ]
    varying = ("seconds", "seconds_saving", "peak_memory_bytes", "processes")
    found["summary"] = record["summary"] | dict.fromkeys(varying, 0)
    return found


def tear(file: Path, generator: random.Random) -> None:
    """Cut the file, or flip one bit."""
    data = bytearray(file.read_bytes())
    place = generator.randrange(len(data))
    if generator.random() < 0.5:
        data[place] ^= 1 << generator.randrange(8)
    else:
        del data[place:]
    file.write_bytes(data)


def campaign(folder: Path, script, flags: str, kills: int, generator: random.Random) -> dict:
    """So many kills of one kind of run; counts of them, of torn states, of runs compared and of
    runs the same."""
    arguments = (
        f"--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl"
    ).split()
    arguments += f"{COMMON} {flags}".split()
    shutil.rmtree(folder / "whole", ignore_errors=True)
    code, said = in_process(folder, [*arguments, "--out", f"{folder}/whole/run"], script=script)
    assert code == 0, said
    expected, moments = (
        contents(folder / "whole/run"),
        json.loads((folder / "counts.json").read_text()),
    )
    counts, run = dict.fromkeys(("kills", "torn", "runs", "same"), 0), folder / "killed/run"
    while counts["kills"] < kills or run.exists() or not counts["runs"]:
        kind = generator.choice(["forward", "chunk", "file"]) if counts["kills"] < kills else ""
        sent = generator.choice(SIGNALS) if kind == "forward" else signal.SIGKILL
        number = generator.randint(1, moments[kind]) if kind else 0
        going_on = (run / "run.json").exists()
        code, said = in_process(
            folder,
            ["--resume", str(run)] if going_on else [*arguments, "--out", str(run)],
            kind,
            number,
            sent,
            script,
        )
        if code == 0:
            counts["runs"] += 1
            counts["same"] += contents(run) == expected
            shutil.rmtree(run)
            continue
        wanted = -sent if sent == signal.SIGKILL else 128 + sent
        assert code == wanted, f"exit code {code} instead of {wanted}:\n{said}"
        counts["kills"] += 1
        if sent == signal.SIGKILL and not (run / "run.json").exists():
            shutil.rmtree(run, ignore_errors=True)  # killed before it was a run
        states = sorted((run / "state").glob("step*"))
        if states and generator.random() < 0.3:
            tear(states[-1], generator)
            counts["torn"] += 1
    return counts


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=24, help="of each kind of run")
    parser.add_argument(
        "--seed", type=int, default=0, help="of when a run is killed, and of what is damaged"
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """The exit code: 1 where a run was lost."""
    args = parse_args(argv)
    torch.set_num_threads(1)  # forked processes have none of the others
    generator, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        workshop(Path(folder))
        for name, (script, flags) in utils.progress_bar(RUNS.items(), desc="kinds of run"):
            rows.append(
                {"run": name, **campaign(Path(folder), script, flags, args.kills, generator)}
            )
    print(markdown_table(list(rows[0]), [list(map(str, row.values())) for row in rows]))
    return int(any(row["runs"] != row["same"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
