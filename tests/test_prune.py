"""prune.py in process, pruning/one_shot.py: masks by a score, and the pass that prunes real layers
in order."""

import data
import prune
from masking.layers import check_sparsity
from models.layers import find_layers, weight_matrix
from pruning.one_shot import OneShot, largest, one_shot_masks, prune_model

import pytest
import torch
from masked import inputs_of
from tiny import write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, models):
    """(kind, flags) -> the layers of that model, pruned by prune.py, and of the dense one."""
    folder = tmp_path_factory.mktemp("prune")
    write_corpus(folder / "text.jsonl")

    def run(kind, flags):
        out = folder / f"{kind} {flags}"
        if not out.exists():
            prune.main(
                [
                    *(
                        f"--model {models[kind]} --dtype float32 --device cpu --nsamples 8 "
                        f"--seqlen 64 --dataset {folder}/text.jsonl {flags} --save_model"
                    ).split(),
                    str(out),
                ]
            )
        return [
            find_layers(AutoModelForCausalLM.from_pretrained(path)) for path in (out, models[kind])
        ]

    run.text = str(folder / "text.jsonl")
    return run


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_sparsegpt_prunes_every_layer_strictly_and_changes_what_it_keeps(pruned, kind):
    layers, dense = pruned(kind, "--prune_method sparsegpt --true_sequential")
    assert check_sparsity(layers, (2, 4)) == pytest.approx(0.5, abs=1e-3)
    assert any(
        ((layers[name].weight != 0) & (layers[name].weight != dense[name].weight)).any()
        for name in layers
    )


def test_true_sequential_differs_only_after_the_first_layers(pruned):
    """What comes first sees the same inputs either way; the later layers see pruned ones."""
    (a, _), (b, _) = (
        pruned("llama", "--prune_method wanda"),
        pruned("llama", "--prune_method wanda --true_sequential"),
    )
    same = [torch.equal(a[name].weight, b[name].weight) for name in a]
    assert all(same[:3]) and not all(same[3:])  # q, k, v of the first block


def test_without_true_sequential_each_layer_is_pruned_as_if_alone(load):
    together, alone = load("llama"), load("llama")
    layers, (name, last) = find_layers(together), list(find_layers(alone).items())[-1]
    for chosen, model in (layers, together), ({name: last}, alone):
        prune_model(model, chosen, torch.arange(64).view(2, 32), OneShot("sparsegpt"))
    assert torch.equal(layers[name].weight, last.weight)


@pytest.mark.parametrize("flags", [{}, {"true_sequential": True}, {"prune_method": "sparsegpt"}])
@pytest.mark.parametrize("is_called", [False, True])
def test_layers_that_the_text_does_not_reach_are_pruned_by_magnitude(
    load, flags, is_called, capsys
):
    """As an expert that no token is sent to, or a part of the model that text does not use."""
    model = load("llama")
    model.unused = torch.nn.Linear(8, 4)
    size, layers = model.unused.weight.detach().clone().abs(), find_layers(model, [""])
    if is_called:
        model.model.layers[1].register_forward_hook(
            lambda *_: (model.unused(torch.zeros(0, 8)), None)[1]
        )
    prune_model(model, layers, torch.arange(64).view(2, 32), OneShot(**flags))
    assert f"does not reach 1 of {len(layers)} layers, unused among them" in capsys.readouterr().err
    assert torch.equal(model.unused.weight != 0, largest(size, 2, 4))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_without_pruning(load, method):
    """The weights stay; and pruning gives the same masks."""
    model, before, way = load("gpt2"), load("gpt2").state_dict(), OneShot(method, (1, 4))
    samples = None if method == "magnitude" else torch.arange(64).view(2, 32)
    layers = find_layers(model)
    masks = dict(one_shot_masks(model, layers, samples, way))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    prune_model(model, layers, samples, way)
    assert list(masks) == list(layers)
    assert all(torch.equal(mask, weight_matrix(layers[name]) != 0) for name, mask in masks.items())


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("llama", "--sparsity_type 4:8"),
        ("opt", "--sparsity_type 4:8"),
        ("gpt2", "--sparsity_type 4:8 --true_sequential"),
    ],
)
def test_swaps_bring_the_first_layer_closer_and_change_no_weight(pruned, models, kind, flags):
    (plain, dense), (swapped, _) = pruned(kind, flags), pruned(kind, f"{flags} --swaps 5")
    assert check_sparsity(swapped, (4, 8)) == pytest.approx(0.5, abs=1e-3)
    assert all(
        ((module.weight == dense[name].weight) | (module.weight == 0)).all()
        for name, module in swapped.items()
    )
    model = AutoModelForCausalLM.from_pretrained(models[kind])
    name, module = next(iter(find_layers(model).items()))
    samples = data.calibration_samples(
        AutoTokenizer.from_pretrained(models[kind]), pruned.text, 8, 64, 0
    )
    inputs = inputs_of(model, name, samples)
    plain, swapped = (
        ((weight_matrix(layers[name]) - weight_matrix(module)) @ inputs.T).square().sum()
        for layers in (plain, swapped)
    )
    assert swapped < 0.98 * plain
