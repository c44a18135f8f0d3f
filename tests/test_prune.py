"""prune.py in process: the one-pass solver on real modules, and RIA's formula."""
import pytest
import torch
from tiny import make_gpt2, make_llama, make_opt, write_corpus
from transformers import AutoModelForCausalLM

import prune
from layers import check_sparsity, find_layers, weight_matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    write_corpus(folder / "text.jsonl")
    for kind, make in (("llama", make_llama), ("gpt2", make_gpt2), ("opt", make_opt)):
        make(folder / kind)
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


def test_ria_follows_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(6, 8, generator=generator), torch.rand(8, generator=generator)
    found = prune.ria(weight, norms)
    for i in range(6):
        for j in range(8):
            size = abs(float(weight[i, j]))
            relative = size / sum(abs(float(x)) for x in weight[:, j]) + size / sum(abs(float(x)) for x in weight[i])
            assert float(found[i, j]) == pytest.approx(relative * float(norms[j]) ** 0.5, rel=1e-5)


def test_blocks_of_other_sizes(folder, tmp_path):
    model = pruned(folder, tmp_path / "out", "llama", "--prune_method", "ria", "--sparsity_type", "4:8")
    assert check_sparsity(find_layers(model), (4, 8)) == pytest.approx(0.5, abs=1e-3)
