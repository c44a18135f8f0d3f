"""A user's mistake gets one line that says what is wrong and what to change, exit code 2, and leaves no trace on disk.

A case is a script's working command with flags put after it, of which the last one counts. Most run in this process;
a subprocess of each script proves that the exit code and the single line reach the shell.
"""

import os
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import utils

import pytest
import torch
from mistakes import ALL, COMMANDS, MASKED, SCRIPTS, TRAINING, cases, check_refusal, fill, quietly, snapshot
from tiny import make_moe

from files import atomic

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def w(tmp_path_factory, models):
    """Workshop of whole and broken models, masks, texts and baselines."""
    folder = tmp_path_factory.mktemp("workshop")
    fill(folder, models)
    return folder


@pytest.fixture
def refused(w, tmp_path, monkeypatch, capsys):
    """Run a script as its `__main__` does; check that it was refused properly, with these words in its one line."""
    monkeypatch.chdir(tmp_path)

    def check(script, flags, *words):
        before = snapshot(w, tmp_path)
        arguments = (COMMANDS[script] + " " + flags).format(w=w).split()
        with pytest.raises(SystemExit) as stop:
            utils.run_script(lambda: SCRIPTS[script].main(arguments))
        check_refusal(stop.value.code, capsys.readouterr().err, *words)
        assert snapshot(w, tmp_path) == before
    return check


# ------------------------------------------------------------------------------------------------ the proof by a shell


@pytest.fixture(scope="module")
def shells(w, tmp_path_factory):
    """Each script with a hub id nobody has, offline: (exit code, stderr, what it left in its folder)."""
    def run(script):
        folder = tmp_path_factory.mktemp(script)
        arguments = f"{COMMANDS[script]} --model nobody/has-this".format(w=w).split()
        done = subprocess.run([sys.executable, ROOT / f"{script}.py", *arguments], capture_output=True, text=True,
                              cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        return done.returncode, done.stderr, os.listdir(folder)
    before = snapshot(w)
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(ALL, pool.map(run, ALL)))
    assert snapshot(w) == before
    return results


@pytest.mark.parametrize("script", ALL)
def test_an_unknown_hub_id_in_a_shell(shells, script):
    code, stderr, left = shells[script]
    check_refusal(code, stderr, "--model nobody/has-this cannot be loaded", "hub id")
    assert not left


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_mistake_the_commands_work(w, tmp_path, monkeypatch, script):
    """Else the refusals below could be of something else than they say."""
    monkeypatch.chdir(tmp_path)
    quietly(script, COMMANDS[script].format(w=w))
    assert {name.split(".")[0] for name in os.listdir(tmp_path)} == (set() if script == "compare" else {"new"})


# ----------------------------------------------------------------------------------------------------------- the model


@cases((ALL, "--model {w}/absent", "--model", "absent", "no such folder"),
       (["get_mask", "evaluate"], "--model {w}/text.jsonl", "--model", "no such folder"),
       (ALL, "--model {w}/no_config", "--model", "no_config cannot be loaded", "is wanted"),
       ("inference_loss", "--model {w}/empty", "--model", "empty cannot be loaded", "is wanted"),
       ("inference_loss", "--model {w}/bad_config", "--model", "bad_config cannot be loaded"),
       ("inference_loss", "--model {w}/other_config", "--model", "other_config cannot be loaded"),
       ("inference_loss", "--model {w}/no_tokenizer", "--model", "no_tokenizer cannot be loaded"),
       ("inference_loss", "--model {w}/bad_tokenizer", "--model", "bad_tokenizer cannot be loaded"),
       ("inference_loss", "--model {w}/no_weights", "--model", "no_weights cannot be loaded"),
       ("inference_loss", "--model {w}/bad_weights", "--model", "bad_weights cannot be loaded"),
       ("inference_loss", "--model {w}/few_weights", "few_weights has no weights for model.norm.weight", "restore it"),
       ("inference_loss", "--model {w}/bad_length", "bad_length cannot be loaded"),
       ("inference_loss", "--model {w}/few_rows --mask none", "the tokenizer makes token", "32 embeddings", "its own"),
       (["prune", "evaluate"], "--model {w}/few_rows", "the tokenizer makes token", "32 embeddings", "its own"),
       ("inference_loss", "--device_map nonsense", "nonsense", "device_map"),
       (ALL, "--device nonsense", "--device nonsense cannot be used", "--device cpu"),
       (ALL, "--device cuda:99", "--device cuda:99 cannot be used", "--device cpu"))
def test_models(refused, script, flags, words):
    refused(script, flags, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ALL)
def test_no_gpu(refused, script):
    refused(script, "--device cuda", "--device cuda cannot be used", "--device cpu")


@pytest.mark.parametrize("script", ["prune", "get_mask"])
def test_fused_experts(refused, tmp_path_factory, script):
    model = make_moe(tmp_path_factory.mktemp("moe"))
    refused(script, f"--model {model}", "fused experts", "--targets self_attn")


@cases(("prune", "--model {w}/gpt2 --dataset {w}/long.jsonl --seqlen 300", "--seqlen", "300", "256"),
       ("inference_loss", "--model {w}/gpt2 --mask {w}/mask_gpt2.safetensors --dataset {w}/long.jsonl --sqlen 300",
        "--sqlen", "300", "256"),
       ("train", ("--model {w}/gpt2 --mask {w}/mask_gpt2.safetensors --dataset {w}/long.jsonl --sqlen 300 --targets "
                  "mlp --baseline online"), "--sqlen", "300", "256"),
       ("evaluate", "--model {w}/gpt2 --ppl {w}/long.jsonl --seqlen 300", "--seqlen", "300", "256"))
def test_more_tokens_than_the_model_has_positions(refused, script, flags, words):
    refused(script, flags, *words)


# ----------------------------------------------------------------------------------------------------------- the masks

REMEDY = ("--mask", "get_mask.py", "--model")


@cases((MASKED, "--mask {w}/mask_gpt2.safetensors", "mask", "another model", REMEDY),
       (MASKED, "--mask {w}/mask_other.safetensors", "mask", "another model", REMEDY),
       (MASKED, "--mask {w}/absent.safetensors", "absent.safetensors", "no such mask", "get_mask.py"),
       (MASKED, "--mask {w}/empty", "empty", "holds no masks"),
       (MASKED, "--mask {w}/garbage_mask.safetensors", "garbage_mask.safetensors cannot be read", "make it anew"),
       (MASKED, "--mask {w}/torn_mask.safetensors", "torn_mask.safetensors cannot be read", "make it anew"),
       (MASKED, "--mask {w}/evil", "evil: a.pt cannot be read", "make it anew"),
       (MASKED, "--mask {w}/foreign.npz", "foreign.npz", "'elsewhere' is not one of the model's"),
       ("convert", "--convert {w}/absent", "absent", "no such mask", "get_mask.py"),
       ("convert", "--convert {w}/empty", "empty", "holds no masks"),
       ("convert", "--convert {w}/garbage_mask.safetensors", "garbage_mask.safetensors cannot be read", "make it anew"),
       ("convert", "--convert {w}/torn_mask.safetensors", "torn_mask.safetensors cannot be read", "make it anew"),
       ("convert", "--convert {w}/evil", "evil: a.pt cannot be read", "make it anew"),
       ("convert", "--convert {w}/foreign.npz", "foreign.npz", "does not hold the shapes", "--model"),
       ("convert", "--model {w}/gpt2", "another model", "get_mask.py"),
       ("convert", "--model {w}/absent", "--model", "no such folder"),
       ("convert", "--sparsity_type 4:8", "2:4, not 4:8"),
       ("convert", "--targets q_proj", "--targets does not go with --convert"),
       (MASKED, "--mask {w}/llama/model.safetensors", "model.safetensors", "no maskpro-mask", "give a mask file"),
       ("train", "--mask {w}/mask8.safetensors", "mask8", "4:8, not 2:4"),
       ("train", "--sparsity_type 1:4", "2:4, not 1:4"),
       ("train", "--sparsity_type 2:5", "2:4, not 2:5"),
       ("evaluate", "--mask {w}/mask8.safetensors --sparsity_type 2:4", "mask8", "4:8, not 2:4"),
       ("train", "--mask {w}/attention.safetensors --targets mlp", "attention.safetensors", "--targets"),
       ("evaluate", "--mask {w}/attention.safetensors --targets mlp", "attention.safetensors", "--targets"))
def test_masks(refused, script, flags, words):
    refused(script, flags, *words)


@cases(("get_mask", "--model {w}/llama", "not 2:4 sparse in 14 of 14 layers", "q_proj", "prune.py"),
       ("get_mask", "--sparsity_type 1:4", "not 1:4 sparse in 14 of 14 layers", "--sparsity_type"),
       ("get_mask", "--sparsity_type 2:5", "5 does not divide the 64 input features", "--sparsity_type"),
       ("prune", "--sparsity_type 2:5", "5 does not divide the 64 input features", "--sparsity_type"),
       ("evaluate", "--sparsity_type 2:5", "5 does not divide the 64 input features", "--sparsity_type"),
       ("evaluate", "--sparsity_type 2:4", "14 of 14 layers are not 2:4 sparse", "--sparsity_type"),
       ("evaluate", "--model {w}/sparse8 --sparsity_type 2:4", "layers are not 2:4 sparse", "--sparsity_type"),
       ("evaluate", "--model {w}/minus_zero --sparsity_type 2:4", "zeros are -0.0"),
       (["prune", "get_mask", "train", "evaluate"], "--targets nonsense", "--targets nonsense matches no layer",
        "q_proj"),
       (["prune", "get_mask", "train", "evaluate"], "--targets q_proj nonsense", "--targets nonsense matches"),
       ("train", "--targets (", "--targets ( matches no layer", "q_proj"),
       ("train", "--targets lm_head", "--targets lm_head matches no layer"),
       ("get_mask", "--model {w}/bad_record", "prune.json"))
def test_layers_and_patterns(refused, script, flags, words):
    refused(script, flags, *words)


# ------------------------------------------------------------------------------------------------------------ the data


@cases((TRAINING, "--dataset {w}/absent.jsonl", "absent.jsonl", "no such file", "check the path"),
       (TRAINING, "--dataset {w}/torn.jsonl", "torn.jsonl", ("cannot be read", "only ", "none of")),
       (TRAINING, "--dataset {w}/numbers.jsonl", "numbers.jsonl", "text"),
       (TRAINING, "--dataset {w}/nothing.jsonl", "nothing.jsonl"),
       (TRAINING, "--dataset {w}/picture.png", "picture.png", "no file that ends with", ".jsonl"),
       (TRAINING, "--dataset {w}/empty", "empty", "no file that ends with", ".jsonl"),
       (["inference_loss", "train"], "--dataset {w}/few.jsonl", "only 3 of the 3 documents", "lower --dataset_size"),
       (["inference_loss", "train"], "--sqlen 5000", ("only 0 of the 12 documents", "256 positions"), "--sqlen"),
       (["inference_loss", "train"], "--batchsize 3", "--batchsize 3 does not divide --dataset_size 8", "use 2 or 4"),
       (["inference_loss", "train"], "--sqlen 1", "--sqlen is 1", "at least 2"),
       (TRAINING, "--dataset {w}/torn.json.gz", "torn.json.gz cannot be read", "intact"),
       (TRAINING, "--dataset {w}/surrogate.jsonl", "surrogate.jsonl", "surrogates not allowed", "intact"),
       (TRAINING, "--dataset {w}/mixed.jsonl", "mixed.jsonl", "'int'", "intact"),
       (TRAINING, "--dataset {w}/list.jsonl", "list.jsonl", "row 2 is not a JSON object", "intact"),
       ("prune", "--seqlen 5000", ("none of the 12 documents", "256 positions"), "lower --seqlen"),
       ("evaluate", "--ppl {w}/absent.txt", "absent.txt", "no such file", "check the path"),
       ("evaluate", "--ppl {w}/torn.jsonl", "torn.jsonl", ("cannot be read", "fewer than one window")),
       ("evaluate", "--ppl {w}/nothing.jsonl", "nothing.jsonl"),
       ("evaluate", "--ppl {w}/picture.png", "picture.png", "no file that ends with", ".txt"),
       ("evaluate", "--seqlen 5000", ("fewer than one window of 5000", "256 positions"), "lower --seqlen"),
       ("evaluate", "--seqlen 1", "--seqlen is 1", "at least 2"))
def test_texts(refused, script, flags, words):
    refused(script, flags, *words)


@cases(("train", "--val_fraction 0.6", "--val_fraction 0.6 of 2 minibatches leaves none to learn from"),
       ("train", "--tokens 4000 --estimator running --batchsize 2000", "text.jsonl has only",
        "fewer than one minibatch of 2000 x 32", "lower --batchsize"),
       ("train", "--tokens 256 --estimator running --sqlen 1", "--sqlen is 1", "at least 2"))
def test_minibatches_of_train(refused, script, flags, words):
    refused(script, flags, *words)


@cases((["inference_loss", "evaluate"], "--model {w}/nan", "not finite", "--dtype"),
       (["prune", "inference_loss", "evaluate"], "--model {w}/inf", "not finite", "--dtype"),
       ("train", "--model {w}/nan", "the loss is nan at step 1", "--dtype bfloat16"),
       ("train", "--model {w}/nan --baseline online", "the loss is nan at step 1", "--dtype bfloat16"),
       ("train", "--model {w}/inf --estimator vanilla", "the loss is nan at step 1", "--dtype bfloat16"),
       ("train", "--model {w}/nan --estimator straight_through", "the loss is nan at step 1", "--dtype bfloat16"),
       ("train", "--model {w}/inf --preset fast --tokens 512", "held-out loss of m0 is not finite", "--dtype bfloat16"),
       ("train", "--model {w}/inf --preset fast --tokens 512 --val_fraction 0", "inputs of", "not finite",
        "--dtype bfloat16"),
       ("train", "--model {w}/nan --estimator straight_through --val_fraction 0.3", "held-out loss of m0 is not finite",
        "--dtype bfloat16"))
def test_numbers_that_are_not_finite(refused, script, flags, words):
    refused(script, flags, *words)


# -------------------------------------------------------------------------------------------------------- the baseline

AGAIN = "inference_loss.py"


@cases(("train", "--baseline {w}/absent.npz", "absent.npz", "no such baseline", AGAIN, "--baseline online"),
       ("train", "--baseline {w}/garbage_baseline.npz", "garbage_baseline.npz", "not a baseline file", AGAIN),
       ("train", "--baseline {w}/torn_baseline.npz", "torn_baseline.npz", "not a baseline file", AGAIN),
       ("train", "--baseline {w}/mask.safetensors", "mask.safetensors", "not a baseline file", AGAIN),
       ("train", "--baseline {w}/empty", "empty", "not a baseline file", AGAIN),
       ("train", "--baseline {w}/nan.npz", "nan.npz", "not finite", AGAIN),
       ("train", "--mask {w}/flipped.safetensors", "baseline.npz is stale: mask", AGAIN),
       ("train", "--dataset {w}/other.jsonl", "baseline.npz is stale: tokens", AGAIN),
       ("train", "--sqlen 16", "baseline.npz is stale", "sqlen 32 there, 16 here", AGAIN),
       ("train", "--dataset_size 4", "baseline.npz is stale", "dataset_size 8 there, 4 here", AGAIN),
       ("train", "--batchsize 2", "baseline.npz is stale", "batchsize 4 there, 2 here", AGAIN),
       ("train", "--dtype bfloat16", "baseline.npz is stale: dtype float32 there, bfloat16 here", AGAIN),
       ("train", "--model {w}/other --mask {w}/mask_other.safetensors", "baseline.npz is stale: model", AGAIN))
def test_baselines(refused, script, flags, words):
    refused(script, flags, *words)


def test_the_default_baseline_is_missing(refused, monkeypatch):
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"].replace("--baseline {w}/baseline.npz", ""))
    refused("train", "", "inference_loss_8_bs4_sql32.npz: there is no such baseline", AGAIN)


# ---------------------------------------------------------------------------------------------------------- the output


@cases(("prune", "--save_model {w}/standing", "standing exists already", "another --save_model"),
       ("get_mask", "--save {w}/standing.safetensors", "standing.safetensors exists already", "another --save"),
       ("inference_loss", "--save {w}/standing.npz", "standing.npz exists already", "another --save"),
       ("train", "--out {w}/standing", "standing exists already", "another --out"),
       ("train", "--out {w}/empty", "empty exists already", "another --out"),
       ("evaluate", "--save {w}/standing.json", "standing.json exists already", "another --save"),
       ("convert", "--save {w}/standing.safetensors", "standing.safetensors exists already", "another --save"),
       ("convert", "--save {w}/standing.json/new.safetensors", "standing.json"),
       ("convert", "--save new.bin", "new.bin", ".safetensors"),
       ("plot", "--out {w}/standing", "standing.png exists already", "another --out"),
       ("plot", "--out {w}/standing.json/new", "standing.json"),
       ("get_mask", "--save new.bin", "new.bin", ".safetensors"),
       ("prune", "--save_model {w}/standing.json/new", "standing.json"),
       ("get_mask", "--save {w}/standing.json/new.safetensors", "standing.json"),
       ("inference_loss", "--save {w}/standing.json/new.npz", "standing.json"),
       ("train", "--out {w}/standing.json/new", "standing.json"),
       ("evaluate", "--save {w}/standing.json/new.json", "standing.json"))
def test_outputs(refused, script, flags, words):
    refused(script, flags, *words)


@pytest.mark.parametrize("script, name", [("prune", "out"), ("get_mask", "initial_mask.safetensors"),
                                          ("inference_loss", "inference_loss_8_bs4_sql32.npz"),
                                          ("train", "results/lr50_epoch10000_logits10_size8")])
def test_the_default_outputs_exist(refused, monkeypatch, tmp_path, script, name):
    (tmp_path / name).mkdir(parents=True)
    command = COMMANDS[script].rsplit(" --", 1)[0]  # without its output
    monkeypatch.setitem(COMMANDS, script, command)
    refused(script, "", f"{name} exists already")


# ------------------------------------------------------------------------------------------------------- the arguments


@cases(*[(["prune", "get_mask", "train", "evaluate"], f"--sparsity_type {text}", "--sparsity_type", text, "such as 2:4")
         for text in ("nonsense", "2:2", "0:4", "4:2", "2:32", "2", "2:4:8")],
       *[(["inference_loss", "train"], f"--{name} {value}", f"--{name}", value, "at least 1")
         for name in ("dataset_size", "batchsize", "sqlen", "microbatch") for value in ("-1", "0", "2.5")],
       ("prune", "--sparsity_type -2:4", "--sparsity_type"),
       ("train", "--epoch 0", "--epoch", "at least 1"),
       ("train", "--max_step -3", "--max_step", "at least 1"),
       ("train", "--lr -1", "--lr", "-1"),
       ("train", "--lr nan", "--lr", "nan"),
       ("train", "--lr inf", "--lr", "inf"),
       ("train", "--logits -1", "--logits", "-1"),
       ("train", "--logits nan", "--logits", "nan"),
       ("train", "--alpha -0.5", "--alpha", "-0.5", "[0, 1)"),
       ("train", "--alpha 1", "--alpha", "1.0", "[0, 1)"),
       ("train", "--alpha nan", "--alpha", "nan", "[0, 1)"),
       *[("train", f"--max_minutes {value}", "--max_minutes", value) for value in ("0", "-1", "nan", "inf", "soon")],
       *[("train", f"--{name} {value}", f"--{name}", value, "[0, 1") for name, values in
         (("distill", ("-0.1", "1.5", "nan")), ("val_fraction", ("-0.1", "1.0", "nan"))) for value in values],
       *[("train", f"--{name} {value}", f"--{name}", value, "at least 1")
         for name in ("tokens", "num_evals") for value in ("0", "-5", "1e6")],
       ("train", "--tokens 256", "--tokens", "--baseline online", "--estimator running"),
       ("train", "--tokens 256 --estimator residual", "--tokens", "--baseline online"),
       ("train", "--preset nonsense", "--preset", "fast"),
       ("train", "--schedule nonsense", "--schedule", "cosine"),
       ("train", "--forward nonsense", "--forward", "sample"),
       ("train", "--estimator nonsense", "--estimator", "straight_through"),
       ("train", "--space nonsense", "--space", "pattern"),
       ("train", "--init nonsense", "--init", "random"),
       ("train", "--baseline nonsense", "--baseline", "online"),
       ("prune", "--prune_method nonsense", "--prune_method", "wanda"),
       ("prune", "--nsamples -1", "--nsamples", "at least 1"),
       (["prune", "evaluate"], "--seqlen -1", "--seqlen", "at least 1"),
       ("evaluate", "--nwindows 0", "--nwindows", "at least 1"),
       ("train", "--epoch nonsense", "--epoch", "at least 1"),
       ("train", "--num_evals 0", "--num_evals", "at least 1"),
       ("train", "--tokens 0", "--tokens", "at least 1"),
       ("train", "--tokens 500", "--tokens", "--baseline online"),
       ("train", "--max_minutes -1", "--max_minutes", "-1"),
       ("train", "--val_fraction 1", "--val_fraction", "[0, 1)"),
       ("train", "--val_fraction 0.99", "--val_fraction 0.99 of 2 minibatches leaves none"),
       ("train", "--distill 2", "--distill", "[0, 1]"),
       ("train", "--distill nonsense", "--distill", "nonsense"),
       *[("train", flag, flag.partition(" ")[0], "straight_through learns from gradients, maskpro does not")
         for flag in ("--distill 1", "--curvature", "--gradient_checkpointing", "--forward sample", "--forward soft",
                      "--normalize_gradient block")],
       *[("train", f"--{name} nonsense", f"--{name}", word) for name, word in [
           ("schedule", "cosine"), ("forward", "sample"), ("preset", "fast"), ("logits_dtype", "float16"),
           ("step", "eager")]],
       ("prune", "--percdamp -1", "--percdamp", "at least 0"),
       ("evaluate", "--task_limit 0", "--task_limit", "at least 1"),
       ("evaluate", "--tasks_batchsize 0", "--tasks_batchsize", "at least 1"),
       (list(SCRIPTS)[5:], "--nonsense", "--nonsense"),
       (ALL, "--dtype int8", "--dtype", "float32"),
       (ALL, "--seed 1.5", "--seed", "1.5"),
       (TRAINING, f"--seed {10**30}", "--seed"),
       (ALL, "--nonsense", "--nonsense"))
def test_arguments(refused, script, flags, words):
    refused(script, flags, *words)


# --------------------------------------------------------------------------------------------- tasks, records and runs


@cases(("evaluate", "--task_file {w}/absent.jsonl", "absent.jsonl cannot be read", "one JSON object a line"),
       ("evaluate", "--task_file {w}/empty", "empty cannot be read", "one JSON object a line"),
       ("evaluate", "--task_file {w}/nothing.jsonl", "nothing.jsonl has no items", "one JSON object a line"),
       ("evaluate", "--task_file {w}/deep.quiz.jsonl", "line 1: it is not JSON", "a line looks like"),
       ("evaluate", "--task_file {w}/gold.quiz.jsonl", "line 1: gold is 2", "a line looks like"),
       ("evaluate", "--task_file {w}/picture.png", "picture.png", "one JSON object a line"),
       ("evaluate", "--tasks {w}/code.yaml", "code.yaml has '!function' in it", "--trust_remote_code"),
       ("compare", "--compare {w}/absent.json", "absent.json is no record", "make it with evaluate.py"),
       ("compare", "--compare {w}/empty", "empty/evaluation.json is no record", "make it with evaluate.py"),
       *[("compare", f"--compare {{w}}/record.json {{w}}/{name}.record.json", f"{name}.record.json is no record",
          "make it with evaluate.py") for name in ("not_json", "deep", "word", "endless")],
       ("plot", "{w}/absent", "metrics.jsonl cannot be read", "give run folders"),
       ("plot", "{w}/no_step", "has no step yet", "give another run"),
       ("plot", "{w}/damaged_step", "damaged_step/metrics.jsonl cannot be read (it is damaged)"))
def test_tasks_records_and_runs(refused, script, flags, words):
    refused(script, flags, *words)


# ------------------------------------------------------------------------------------------------------------ the disk


@pytest.mark.parametrize("script", ["prune", "inference_loss", "evaluate"])
def test_a_disk_that_is_full(refused, monkeypatch, script):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(100))
    refused(script, "", "0.0 MiB left", "free some space")
