"""The rows of bench/estimators.py: which learner each is, and its settings.

learner: a key of `estimator_runs.FORWARD_ONLY` or `GRADIENTS`, control_variate or leave_one_out; lr, logits (C),
normalize, debias, sample, distill: as train.py's flags of that name; samples: masks a step; scores, swaps: where the
logits start; batchsize, fresh: text that no run repeats, in minibatches of this size; sharpen: what C grows by over the
run; ramp: where the curvature counts (training/curvature.py); soft: masks are soft at first; stop: nats above m0 at
which a run is given up.
"""
from training.args import PRESETS
from training.curvature import FULL, START

FITTED = dict(lr=10, logits=5)  # what fits this model, in the paper's terms
UNIT = dict(lr=0.1, logits=5, normalize=True)  # lr in logits
FAST = dict(learner="straight_through", lr=PRESETS["fast"]["lr"], logits=PRESETS["fast"]["logits"], scores=True)
FRESH = dict(FAST, distill=PRESETS["fast"]["distill"], batchsize=PRESETS["fast"]["batchsize"], fresh=True)
SWAPS = {name: value for name, value in FRESH.items() if name != "scores"} | {"swaps": True}
PRESET = dict(SWAPS, ramp=(START, FULL))
SOFT = dict(PRESET, soft=True, normalize_gradient="block")
ROWS = {
    "paper: vanilla (eta 0.03, C 5)": dict(learner="vanilla", lr=0.03, logits=5),
    "paper: residual (eta 10, C 5)": dict(learner="residual", **FITTED),
    "paper: maskpro, authors' settings (eta 50, C 10)": dict(learner="maskpro", lr=50, logits=10),
    "paper: maskpro (eta 10, C 5)": dict(learner="maskpro", **FITTED),
    "maskpro, debiased tracker": dict(learner="maskpro", debias=True, **FITTED),
    "running baseline": dict(learner="running", **FITTED),
    "running baseline, normalized": dict(learner="running", **UNIT),
    "leave-one-out, 2 masks a step, normalized": dict(learner="leave_one_out", samples=2, **UNIT),
    "leave-one-out, 4 masks a step, normalized": dict(learner="leave_one_out", samples=4, **UNIT),
    "control variate (eta 10)": dict(learner="control_variate", **FITTED),
    "straight-through, sampled": dict(learner="straight_through", sample=True, lr=FAST["lr"], logits=5),
    "+ logits from scores": dict(FAST, sample=True),
    "+ at the most probable mask": FAST,
    "+ distillation": dict(FAST, distill=1.0),
    "+ fresh sequences, 8 a minibatch": FRESH,
    "+ swaps instead of scores": SWAPS,
    "+ curvature: the preset": PRESET,
    "without curvature, momentum 0.9": dict(SWAPS, learner="momentum"),
    "without curvature, sign": dict(SWAPS, learner="sign"),
    "without curvature, C from 2 to 8": dict(SWAPS, logits=2.0, sharpen=4.0),
}
LONG = {  # with --long: (row, its share of the passes)
    "long: paper, maskpro (eta 10, C 5)": (dict(ROWS["paper: maskpro (eta 10, C 5)"], stop=0.5), 1),
    "long: paper, maskpro but with a debiased tracker": (dict(ROWS["maskpro, debiased tracker"], stop=0.5), 1),
    "long: running baseline, normalized": (ROWS["running baseline, normalized"], 1 / 5),
    "long: the same from swaps": (dict(ROWS["running baseline, normalized"], swaps=True), 1 / 5),
    "long: the preset": (PRESET, 1 / 50),
}
PATTERNS = ((1, 4), (2, 4), (4, 8), (8, 16))  # with --patterns
