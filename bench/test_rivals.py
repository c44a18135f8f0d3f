"""Tests the methods of bench/rival_methods.py against formulas and brute force on a toy model, and
runs the bench itself on a tiny model."""

import json
from types import SimpleNamespace

import pge

import pytest
import rivals
import small_model
import torch
from random_models import random_llama
from rival_methods import MaskLLM, RoI, ScoresSTE
from rivals import setting_of
from torch import nn

BATCH = torch.tensor([[0, 1, 2, 3, 1], [3, 2, 2, 0, 1]])
MASKS = {"inner": torch.tensor([[True, False, False, True], [False, True, True, False]])}
NORMS = {"inner": torch.tensor([1.0, 2.0, 0.5, 1.5])}


class Toy(nn.Module):
    """Tokens -> 4 features -> one masked layer `[2, 4]`, tanh -> 4 predictions. The loss is far
    from linear in the masked layer's weight."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed, self.inner, self.head = (
            nn.Embedding(4, 4),
            nn.Linear(4, 2, bias=False),
            nn.Linear(2, 4, bias=False),
        )
        for parameter in self.parameters():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(torch.tanh(self.inner(self.embed(input_ids)))))


def gradient_at(weight):
    """Return d loss / d weight of the toy's masked layer, by autograd through a model written out
    here."""
    model, weight = Toy(), weight.clone().requires_grad_()
    logits = model.head(torch.tanh(model.embed(BATCH) @ weight.T))[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), BATCH[:, 1:].flatten())
    return torch.autograd.grad(loss, weight)[0]


def learned(kind, n=2, **further):
    """Return a rival on the toy after one step with learning rate 0, and its parameters."""
    rival = kind(Toy(), MASKS, NORMS, n, 4, lr=0.0, **further)
    rival.learn(BATCH, 0, 1)
    return rival, rival.parameters["inner"]


def test_a_score_moves_as_if_its_weight_were_kept():
    rival, score = learned(ScoresSTE)
    dense = rival.dense("inner")
    wanda = dense.abs() * NORMS["inner"]
    mask = torch.zeros(2, 4, dtype=torch.bool).scatter_(1, wanda.topk(2).indices, True)
    assert torch.equal(rival.mask("inner"), mask)
    expected = dense * gradient_at(dense * mask)
    assert torch.allclose(score.grad, expected, atol=1e-6)
    assert expected[~mask].abs().min() > 1e-3


def test_distillation_has_the_dense_model_as_its_target():
    """If all weights are kept, the gradient of the cross entropy with the model's own predictions
    is 0."""
    assert learned(ScoresSTE, n=4, distill=1.0)[1].grad.abs().max() < 1e-6
    assert learned(ScoresSTE, n=4)[1].grad.abs().max() > 1e-3


def test_maskllm_starts_from_its_prior():
    model = Toy()
    model.inner = nn.Linear(4, 20000, bias=False)
    mask = torch.tensor([[True, False, True, False]]).expand(20000, 4)
    rival = MaskLLM(model, {"inner": mask}, {}, 2, 4, lr=0.1)
    shared = (pge.patterns(2, 4) & mask[0]).sum(1)  # 2 with itself, 0 with its complement, else 1
    logits = rival.parameters["inner"].detach()
    assert torch.allclose(logits.mean(1), 0.03 * (shared - 1), atol=4e-4)
    assert torch.allclose(logits.std(1), torch.full((6,), 0.01), atol=3e-4)


@pytest.mark.parametrize(
    "kind, logits, most_are_drawn, are_mixed",
    [
        (MaskLLM, [0.2, -0.7, 1.1, 0.0, 0.5, -0.1], 0.9, 1.0),
        (RoI, [0.2, -0.7, 1.1, 0.0], 0.85, 0.8),
    ],
)
def test_masks_are_drawn_in_the_end_and_mixed_at_first(kind, logits, most_are_drawn, are_mixed):
    """MaskLLM draws a pattern, RoI weights without replacement."""
    model, logits = Toy(), torch.tensor(logits)
    model.inner = nn.Linear(4, 40000, bias=False)
    model.inner.weight.data.fill_(1.0)
    rival = kind(model, {"inner": torch.ones(40000, 4, dtype=torch.bool)}, {}, 2, 4, lr=0.1)
    rival.parameters["inner"].data = (logits / 500)[:, None].repeat(1, 40000)
    rival.progress = 1.0
    drawn = rival.weight("inner")
    expected = (
        logits.softmax(0) @ pge.patterns(2, 4).float()
        if kind is MaskLLM
        else inclusion(logits[None])[0]
    )
    assert torch.allclose(drawn.mean(0), expected, atol=0.01)
    assert ((drawn < 0.02) | (drawn > 0.98)).float().mean() > most_are_drawn
    assert float(rival.penalty.detach()) == pytest.approx(
        -kind.norm_reward * float(drawn.detach().square().sum())
    )
    rival.progress = 0.0
    mixed = rival.weight("inner")
    assert torch.allclose(mixed.sum(1), torch.full((40000,), 2.0))
    assert ((mixed > 0.02) & (mixed < 0.98)).float().mean() > are_mixed - 1e-3


def inclusion(logits: torch.Tensor) -> torch.Tensor:
    """Return P(i is one of the two kept) for logits `[blocks, 4]`."""
    table = pge.patterns(2, 4)
    probs = pge.log_prob(logits.repeat_interleave(6, 0), table.repeat(len(logits), 1)).exp()
    return probs.view(-1, 6) @ table.float()


def test_two_successive_softmaxes():
    """The second one's keys are lower by what the first took, also if keys are far apart."""
    rival = RoI(Toy(), MASKS, NORMS, 2, 4, lr=0.1)
    keys = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -1, 2, 1000
    )
    keys.requires_grad_()
    kept = rival.kept(keys, 0.5)
    w = (keys.detach().double() / 0.5).softmax(0)
    second = w * (w.sum(0) - w) ** 2
    is_close = keys.detach().abs().amax(0) < 3  # beyond, 1 - w cancels
    expected = (w + second / second.sum(0)).float()
    assert torch.allclose(kept[:, is_close], expected[:, is_close], atol=1e-4)
    assert torch.allclose(kept.sum(0), torch.full((1000,), 2.0)) and kept.isfinite().all()
    kept[0].sum().backward()
    assert keys.grad.isfinite().all()


def test_roi_starts_without_m0_and_cools_in_three_quarters():
    rival = RoI(Toy(), MASKS, NORMS, 2, 4, lr=0.1)
    assert rival.parameters["inner"].abs().max() < 0.05
    rival.progress = 0.375
    assert rival.between(*rival.temperatures) == pytest.approx(0.05**0.5)
    rival.progress = 0.9
    assert rival.between(*rival.temperatures) == pytest.approx(0.05)
    assert 1 / rival.between(*rival.scales) == pytest.approx(0.002)


def test_a_row_takes_what_is_tuned_for_its_budget():
    row = dict(learner="maskllm", lr=1.0, tuned={160: dict(lr=2.0), 640: dict(lr=3.0)})
    assert [setting_of(row, passes)["lr"] for passes in (10, 160, 639, 640, 5000)] == [
        2.0,
        2.0,
        2.0,
        3.0,
        3.0,
    ]
    assert setting_of(dict(lr=1.0), 160) == dict(lr=1.0)


def test_the_bench_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    text = "the quick brown fox jumps over the lazy dog and then it sleeps " * 3
    (tmp_path / small_model.TEXT).write_text(
        "\n".join(json.dumps({"text": f"{i} {text}"}) for i in range(520))
    )
    (tmp_path / small_model.HELDOUT).write_text(text * 300)
    random_llama("tiny", "cpu", torch.float32).save_pretrained("tiny")
    small_model.byte_tokenizer().save_pretrained("tiny")
    flags = ["--device", "cpu", "--model", "tiny", "--json", "runs.json", "--budgets", "12"]
    rivals.main([*flags, "--seeds", "2", "--rows", "ours + KD"])
    assert "ours + KD, 12 passes, seed 1" in capsys.readouterr().out
    rivals.main([*flags, "--seeds", "2", "--rows", "ours + KD"])
    assert "ours + KD, 12 passes, seed" not in capsys.readouterr().out  # the file has both
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run["seed"] for run in runs] == [0, 1]

    (tmp_path / "runs.json").unlink()
    flags = ["--quick", *flags[:6], "--rows"]
    rivals.main([*flags, "MaskLLM,ours + KD,forward-only: MaskPro"])
    printed = capsys.readouterr().out
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [(run["method"], round(float(run["state"]), 2)) for run in runs] == [
        ("ours + KD", 4.75),
        ("MaskLLM", 24),
        ("forward-only: MaskPro", 4.25),
    ]
    assert all(f"{run['loss']:.4f} ({run['seconds']} s)" in printed for run in runs)
    rivals.main([*flags[:5], "--rows", "STE + Adam", "--rates", "0.001,0.002"])
    assert "STE + Adam, rate 0.002" in capsys.readouterr().out
