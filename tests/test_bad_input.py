"""A user's mistake gets one line that says what is wrong and what to change, exit code 2, and
leaves no trace on disk.

A case is a script's working command with flags put after it, of which the last one counts. They run
in this process; that exit code and line reach a shell is seen in test_reproduce.py.
"""

import os

import utils

import pytest
from mistakes import ALL, COMMANDS, cases, check_refusal, fill, quietly, script_of, snapshot


@pytest.fixture(scope="module")
def w(tmp_path_factory, models):
    """Workshop of whole and broken models, masks, texts and baselines."""
    folder = tmp_path_factory.mktemp("workshop")
    fill(folder, models)
    return folder


@pytest.fixture
def refused(w, tmp_path, monkeypatch, capsys):
    """Run a script as its `__main__` does; check that it was refused properly, with these words in
    its one line."""
    monkeypatch.chdir(tmp_path)

    def check(script, flags, *words):
        before = snapshot(w, tmp_path)
        arguments = (COMMANDS[script] + " " + flags).format(w=w).split()
        with pytest.raises(SystemExit) as stop:
            utils.run_script(lambda: script_of(script).main(arguments))
        check_refusal(stop.value.code, capsys.readouterr().err, *words)
        assert snapshot(w, tmp_path) == before

    return check


@pytest.mark.parametrize("script", COMMANDS)
def test_without_a_mistake_the_commands_work(w, tmp_path, monkeypatch, script):
    """Else the refusals below could be of something else than they say."""
    monkeypatch.chdir(tmp_path)
    quietly(script, COMMANDS[script].format(w=w))
    assert {name.split(".")[0] for name in os.listdir(tmp_path)} == (
        set() if script == "compare" else {"new"}
    )


# ---------------------------------------------------------------------------------- a row a message

MODELS = [
    (
        ALL,
        "--model nobody/has-this",
        "nobody/has-this: there is no such folder, and as a hub id it cannot",
        "hub id",
    ),
    ("sparsify", "--model no/such/folder", "--model no/such/folder: there is no such folder"),
    (
        "prune",
        "--model {w}/model.gguf",
        "model.gguf is a file: give the folder of a causal LM",
        "gguf_file",
    ),
    ("prune", "--model {w}/bert", "it is BertForMaskedLM, not a causal language model"),
    ("eval", "--device gpu", "--device gpu cannot be used here", "is cuda meant?"),
    ("get_mask", "--model {w}/absent", "--model", "absent", "no such folder"),
    (
        "eval",
        "--model {w}/no_config",
        "--model",
        "no_config cannot be read",
        "give the folder of a causal LM",
    ),
    *[
        ("inference_loss", f"--model {{w}}/{name}", "--model", f"{name} cannot be read")
        for name in ("bad_config", "other_config", "no_weights", "bad_weights")
    ],
    (
        "inference_loss",
        "--model {w}/no_tokenizer",
        "there is no tokenizer in",
        "no_tokenizer: copy the base model's",
    ),
    (
        "inference_loss",
        "--model {w}/few_weights",
        "few_weights has no weights for model.norm.weight",
        "restore it",
    ),
    (
        "prune",
        "--model {w}/quantised",
        "quantised",
        "its weights are quantised; give the original model",
    ),
    (
        "eval",
        "--model {w}/unfinished",
        "unfinished has no sparse model",
        "give its base model, with --mask",
    ),
    (
        "prune",
        "--model {w}/kernel",
        "run code from the Hub, the kernel a/b",
        "--trust_remote_code if you trust",
    ),
    (
        "prune",
        "--model {w}/remote",
        "remote cannot be read",
        ("contains custom code", "execute the configuration"),
    ),
    ("prune", "--model {w}/few_rows", "the tokenizer produces token", "32 embeddings", "its own"),
    (
        "alone",
        "--model {w}/few_rows --dataset {w}/text.jsonl",
        "the tokenizer produces token",
        "32 embeddings",
        "its own",
    ),
    (ALL, "--device cuda:99", "--device cuda:99 cannot be used", "--device cpu"),
    ("prune", "--model {w}/gpt2 --dataset {w}/long.jsonl --seqlen 300", "--seqlen", "300", "256"),
    (
        "sparsify",
        "--model {w}/gpt2 --mask {w}/mask_gpt2.safetensors --seqlen 300",
        "--seqlen",
        "300",
        "256",
    ),
    ("eval", "--model {w}/gpt2 --ppl {w}/long.jsonl --seqlen 300", "--seqlen", "300", "256"),
    ("eval", "--model {w}/nan", "not finite", "--dtype"),
    ("prune", "--model {w}/inf", "not finite", "--dtype"),
    (
        "alone",
        "--model {w}/reordered --permute",
        "were reordered before",
        "give the model that it was made from",
    ),
    ("train", "--model {w}/nan", "the loss is nan at step 1", "--dtype bfloat16"),
    (
        "train",
        "--model {w}/nan --baseline online --val_fraction 0.3",
        "held-out loss of m0 is not finite",
        "bfloat16",
    ),
    ("sparsify", "--model {w}/inf", "held-out loss of m0 is not finite", "--dtype bfloat16"),
]
MASKS = [
    (
        "train",
        "--mask {w}/mask_gpt2.safetensors",
        "mask",
        "another model",
        ("--mask", "get_mask.py", "--model"),
    ),
    (
        "sparsify",
        "--mask {w}/mask_other.safetensors",
        "mask",
        "another model",
        ("--mask", "get_mask.py", "--model"),
    ),
    (
        "eval",
        "--mask {w}/begun",
        "begun: the run has no mask yet: let it finish, or continue it with --resume",
    ),
    (
        "eval",
        "--mask {w}/absent.safetensors",
        "absent.safetensors",
        "no such file",
        "check the path",
    ),
    (
        "train",
        "--mask {w}/torn_mask.safetensors",
        "torn_mask.safetensors cannot be read",
        "make it anew",
    ),
    (
        "eval",
        "--mask {w}/llama/model.safetensors",
        "model.safetensors",
        "is not a maskpro-mask file of version",
        "give one",
    ),
    ("train", "--mask {w}/mask8.safetensors", "mask8", "4:8, not 2:4"),
    (
        ["eval", "inference_loss"],
        "--mask {w}/mask8.safetensors --sparsity_type 2:4",
        "mask8",
        "4:8, not 2:4",
    ),
    (
        "train",
        "--mask {w}/attention.safetensors --targets mlp",
        "the mask has none of the layers that --targets name",
    ),
    ("get_mask", "--convert {w}/mask.safetensors --targets q_proj", "--targets"),
    ("get_mask", "--model {w}/llama", "14 of 14 layers are not 2:4 sparse", "q_proj", "prune.py"),
    (
        ["get_mask", "prune", "alone"],
        "--sparsity_type 2:5",
        "5 does not divide the 64 input features",
        "--sparsity_type",
    ),
    ("train", "--sparsity_type 9:16", "a sum over 2^9 subsets of each block", "sparsify.py"),
    (
        ["prune", "get_mask", "train", "eval"],
        "--targets q_proj nonsense",
        "--targets nonsense matches",
        "q_proj",
    ),
]
TEXTS = [
    (
        "train",
        "--mask {w}/gone.npz --dataset {w}/absent.jsonl",
        "gone.npz",
        "absent.jsonl: no such file",
        "the path",
    ),
    ("sparsify", "--ppl {w}/absent.txt", "absent.txt: no such file", "check the path"),
    ("alone", "--ppl {w}/short.txt", "fewer than one window of 256", "use a longer text"),
    ("alone", "--ppl {w}/text.jsonl ./text.jsonl", "two texts have the same name"),
    ("train", "--dataset {w}/few.jsonl", "only 3 of the 3 documents", "lower --dataset_size"),
    (
        ["train", "inference_loss"],
        "--dataset {w}/long.jsonl --seqlen 300",
        "--seqlen 300 exceeds the model's 256",
    ),
    (
        "inference_loss",
        "--batchsize 3",
        "--batchsize 3 does not divide --dataset_size 8",
        "change one",
    ),
    (
        ["inference_loss", "sparsify", "eval"],
        "--seqlen 1",
        "--seqlen",
        "'1' is not a whole number of at least 2",
    ),
    ("eval", "--seqlen 5000", ("fewer than one window of 5000", "256 positions"), "lower --seqlen"),
    (
        "train",
        "--val_fraction 0.6",
        "--val_fraction 0.6 of 2 minibatches leaves none to learn from",
    ),
    (
        "sparsify",
        "--shard --batchsize 2000",
        "has only",
        "fewer than one minibatch of 2000 x 32",
        "lower --batchsize",
    ),
]
AGAIN = "inference_loss.py"
BASELINES = [
    (
        "train",
        "--baseline {w}/absent.npz",
        "absent.npz",
        "no such baseline",
        AGAIN,
        "--baseline online",
    ),
    *[
        ("train", f"--baseline {{w}}/{name}", f"{name} cannot be read", AGAIN)
        for name in ("torn_baseline.npz", "mask.safetensors")
    ],
    ("train", "--baseline {w}/nan.npz", "nan.npz", "not finite", AGAIN),
    (
        "train",
        "--baseline cached",
        "inference_loss_8_bs4_sql32.npz: no such baseline file",
        AGAIN,
    ),
    ("train", "--mask {w}/flipped.safetensors", "baseline.npz is stale: mask", AGAIN),
    ("train", "--dataset {w}/other.jsonl", "baseline.npz is stale: tokens", AGAIN),
    ("train", "--seqlen 16", "baseline.npz is stale", "seqlen 32 there, 16 here", AGAIN),
    (
        "train",
        "--dtype bfloat16",
        "baseline.npz is stale: dtype float32 there, bfloat16 here",
        AGAIN,
    ),
    (
        "train",
        "--model {w}/other --mask {w}/mask_other.safetensors",
        "baseline.npz is stale: model",
        AGAIN,
    ),
]
OUTPUTS = [
    *[
        (
            script,
            f"--{flag} {{w}}/standing{end}",
            f"standing{shown} exists already",
            f"another --{flag}",
        )
        for script, flag, end, shown in (
            ("prune", "save_model", "", ""),
            ("get_mask", "save", *[".safetensors"] * 2),
            ("inference_loss", "save", *[".npz"] * 2),
            ("train", "out", "", ""),
            ("sparsify", "out", "", ""),
            ("eval", "save", *[".json"] * 2),
            ("plot", "out", "", ".png"),
        )
    ],
    ("train", "--out {w}/standing.json/new", "standing.json"),
    ("get_mask", "--save new.bin", "new.bin", ".safetensors"),
]
ARGUMENTS = [
    *[
        ("train", f"--sparsity_type {text}", "--sparsity_type", text, "such as 2:4")
        for text in ("nonsense", "2:2", "0:4", "2:32", "2:4:8")
    ],
    *[
        (script, f"--{name} {value}", f"--{name}", value, "at least 1")
        for script, name, value in (
            ("inference_loss", "dataset_size", "-1"),
            ("train", "batchsize", "2.5"),
            ("train", "epoch", "nonsense"),
            ("sparsify", "steps", "1e6"),
            ("prune", "nsamples", "0"),
            ("eval", "nwindows", "0"),
        )
    ],
    *[
        ("train", f"--{name} {value}", f"--{name}", value)
        for name, value in (
            ("lr", "-1"),
            ("lr", "nan"),
            ("logits", "-1"),
            ("alpha", "1.0"),
            ("val_fraction", "nan"),
        )
    ],
    (
        "train",
        "--space pattern --sparsity_type 8:16",
        "12870 logits per block of 8:16; use --space linear",
    ),
    *[
        ("train", f"--checkpoint_every {every}", "such as 10m")
        for every in ("0", "0m", "-1", "5s", "m", "1.5", "nan")
    ],
    ("prune", "--prune_method sparsegpt --swaps 3", "--swaps improves a mask of unchanged weights"),
    ("prune", f"--seed {10**30}", "--seed"),
    ("train", "--sparsty_type 2:4", "--sparsty_type", "did you mean --sparsity_type?"),
    (list(COMMANDS), "--nonsense", "--nonsense"),
]
RECORDS = [
    ("eval", "--task_file {w}/absent.jsonl", "absent.jsonl: no such file", "check the path"),
    *[
        (
            "compare",
            f"--compare {{w}}/record.json {{w}}/{name}",
            name,
            "cannot be read",
            "give a record of eval.py",
        )
        for name in ("absent.json", "torn.json")
    ],
    ("compare", "--compare {w}/nothing", "there are no evaluations; give JSON files of eval.py"),
    ("plot", "{w}/absent", "metrics.jsonl cannot be read", "give run folders"),
]


@cases(*MODELS, *MASKS, *TEXTS, *BASELINES, *OUTPUTS, *ARGUMENTS, *RECORDS)
def test_mistakes(refused, script, flags, words):
    refused(script, flags, *words)


@pytest.mark.parametrize("script", ["prune", "inference_loss", "eval"])
def test_several_processes_for_the_work_of_one(refused, monkeypatch, script):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(script, "", "2 processes were started", "start this script as a single process")


@pytest.mark.parametrize(
    "script, name",
    [
        ("prune", "out"),
        ("get_mask", "initial_mask.safetensors"),
        ("inference_loss", "inference_loss_8_bs4_sql32.npz"),
        ("train", "llama_2of4_maskpro"),
        ("sparsify", "llama_2of4_sparsify"),
    ],
)
def test_the_default_outputs_exist(refused, monkeypatch, tmp_path, script, name):
    if script in ("train", "sparsify"):
        monkeypatch.setattr("training.arguments.short_hash", lambda settings: "hash")
        name = f"results/{name}_hash"
    (tmp_path / name).mkdir(parents=True)
    command = COMMANDS[script].rsplit(" --", 1)[0]  # without its output
    monkeypatch.setitem(COMMANDS, script, command)
    refused(script, "", f"{name} exists already")
