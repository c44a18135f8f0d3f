"""prune.py in process, pruning/one_shot.py: the one-pass solver on real modules, and RIA's formula."""
import dataclasses
import shutil

from utils import arguments_of

import pytest
import torch
from tiny import write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import prune
from masking.layers import check_sparsity
from models.layers import find_layers, weight_matrix
from pruning.one_shot import OneShot, largest, prune_model, ria


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("prune")
    write_corpus(folder / "text.jsonl")
    for kind, path in models.items():
        shutil.copytree(path, folder / kind)
    return folder


def pruned(folder, out, kind, *arguments):
    prune.main(["--model", str(folder / kind), "--dtype", "float32", "--device", "cpu", "--nsamples", "8", "--seqlen",
                "64", "--dataset", str(folder / "text.jsonl"), "--save_model", str(out), *arguments])
    return AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_sparsegpt_prunes_every_layer_strictly_and_changes_what_it_keeps(folder, tmp_path, kind):
    model = pruned(folder, tmp_path / "out", kind, "--prune_method", "sparsegpt", "--true_sequential")
    layers = find_layers(model)
    assert check_sparsity(layers, (2, 4)) == pytest.approx(0.5, abs=1e-3)
    dense = find_layers(AutoModelForCausalLM.from_pretrained(folder / kind))
    kept = [weight_matrix(module) != 0 for module in layers.values()]
    assert any(not torch.equal(weight_matrix(layers[name])[mask], weight_matrix(dense[name])[mask])
               for name, mask in zip(layers, kept))


def test_true_sequential_differs_only_after_the_first_layers(folder, tmp_path):
    """What comes first sees the same inputs either way; the later layers see pruned ones."""
    dense_inputs = pruned(folder, tmp_path / "a", "llama", "--prune_method", "wanda")
    sequential = pruned(folder, tmp_path / "b", "llama", "--prune_method", "wanda", "--true_sequential")
    a, b = find_layers(dense_inputs), find_layers(sequential)
    names = list(a)
    assert all(torch.equal(a[name].weight, b[name].weight) for name in names[:3])  # q, k, v of the first block
    assert not all(torch.equal(a[name].weight, b[name].weight) for name in names[3:])


@pytest.mark.parametrize("flags", [{}, {"true_sequential": True}, {"prune_method": "sparsegpt"}])
def test_layers_that_the_text_does_not_reach_are_pruned_by_magnitude(load, flags):
    """As an expert that no token is sent to, or a part of the model that text does not use."""
    model = load("llama")
    model.unused = torch.nn.Linear(8, 4)
    layers = find_layers(model, [""])
    size = model.unused.weight.detach().clone().abs()
    samples = torch.arange(64).view(2, 32)
    assert prune_model(model, layers, samples, OneShot(**flags)) == ["unused"]
    assert torch.equal(model.unused.weight != 0, largest(size, 2, 4))


def test_ria_follows_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(6, 8, generator=generator), torch.rand(8, generator=generator)
    found = ria(weight, norms)
    for i in range(6):
        for j in range(8):
            size = abs(float(weight[i, j]))
            relative = size / sum(abs(float(x)) for x in weight[:, j]) + size / sum(abs(float(x)) for x in weight[i])
            assert float(found[i, j]) == pytest.approx(relative * float(norms[j]) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_unstructured_takes_the_share_where_the_method_looks(folder, tmp_path, method, ratio):
    """Exactly the share of each layer (magnitude) or of each row (wanda, ria), and those of the smallest metric."""
    model = pruned(folder, tmp_path / "out", "llama", "--prune_method", method, "--sparsity_type", "unstructured",
                   "--sparsity_ratio", str(ratio))
    layers, dense = find_layers(model), find_layers(AutoModelForCausalLM.from_pretrained(folder / "llama"))
    for name in layers:
        weight, original = layers[name].weight, dense[name].weight
        zero = weight == 0
        assert not torch.signbit(weight[zero]).any()
        if method == "sparsegpt":
            assert float(zero.float().mean()) == pytest.approx(ratio, abs=0.01)
        elif method == "magnitude":
            assert int(zero.sum()) == int(ratio * zero.numel())
            assert original[zero].abs().max() <= original[~zero].abs().min()
        else:
            assert (zero.sum(1) == int(ratio * zero.shape[1])).all()
        if method != "sparsegpt":
            assert torch.equal(weight[~zero], original[~zero])
    assert not all(((layer.weight != 0).reshape(-1, 4).sum(1) <= 2).all() for layer in layers.values())  # not 2:4


def test_unstructured_by_a_metric_of_ones_own():
    weight = torch.tensor([[1.0, -8, 3, 2], [5, 6, -7, 4]])
    norms = torch.tensor([9.0, 1, 1, 1])
    way = OneShot(**arguments_of(OneShot, prune.parse_args(["--sparsity_type", "unstructured"])))
    assert way.mask(weight, norms).tolist() == [[True, True, False, False], [True, False, True, False]]
    way = dataclasses.replace(way, prune_method="magnitude")
    assert way.mask(weight, None).tolist() == [[False, True, False, False], [True, True, True, False]]


def test_the_ratio_and_the_pattern_must_agree(capsys):
    assert prune.parse_args(["--sparsity_type", "1:4"]).sparsity_ratio == 0.75
    assert prune.parse_args(["--sparsity_type", "2:4", "--sparsity_ratio", "0.5"]).sparsity_type == (2, 4)
    for arguments in ("--sparsity_ratio 0.7", "--sparsity_type unstructured --sparsity_ratio 1", "--sparsity_ratio x"):
        with pytest.raises(SystemExit) as stop:
            prune.parse_args(arguments.split())
        assert stop.value.code == 2 and "--sparsity_ratio" in capsys.readouterr().err


def test_blocks_of_other_sizes(folder, tmp_path):
    model = pruned(folder, tmp_path / "out", "llama", "--prune_method", "ria", "--sparsity_type", "4:8")
    assert check_sparsity(find_layers(model), (4, 8)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("flags", [[], ["--true_sequential"]])
def test_swaps_bring_the_first_layer_closer_and_change_no_weight(folder, tmp_path, kind, flags):
    flags = ["--prune_method", "wanda", "--sparsity_type", "4:8", *flags]
    plain = find_layers(pruned(folder, tmp_path / "a", kind, *flags))
    swapped = find_layers(pruned(folder, tmp_path / "b", kind, *flags, "--swaps", "5"))
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    dense = find_layers(model)
    assert check_sparsity(swapped, (4, 8)) == pytest.approx(0.5, abs=1e-3)
    for name, module in swapped.items():
        weight, kept = weight_matrix(module), weight_matrix(module) != 0
        assert torch.equal(weight[kept], weight_matrix(dense[name])[kept])
    name, inputs = next(iter(dense)), []
    dense[name].register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, -2)))
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    samples = data.calibration_samples(tokenizer, str(folder / "text.jsonl"), 8, 64, 0)
    with torch.no_grad():
        model(input_ids=samples)

    def error(layers):
        return float(((weight_matrix(layers[name]) - weight_matrix(dense[name])) @ inputs[0].T).square().sum())
    assert error(swapped) < 0.98 * error(plain)


@pytest.mark.parametrize("flags", ["--prune_method sparsegpt", "--sparsity_type unstructured"])
def test_swaps_are_for_masks_of_unchanged_weights(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        prune.parse_args(f"{flags} --swaps 3".split())
    assert stop.value.code == 2 and "--swaps improves an N:M mask" in capsys.readouterr().err


def test_the_old_name_of_swaps(capsys):
    """--exchange, as it was called, means the same and is not in the manual."""
    assert vars(prune.parse_args(["--exchange", "3"])) == vars(prune.parse_args(["--swaps", "3"]))
    assert prune.parse_args(["--exchange", "3"]).swaps == 3 and prune.parse_args([]).swaps == 0
    with pytest.raises(SystemExit):
        prune.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "--swaps" in said and "exchange" not in said
