"""The rows of bench/rivals.py: which method each is, its settings, and its rate at each budget.

KD: the loss compares with the dense model's predictions; KD 0.5: in this share, and in the rest with the text.
learner: a key of `rival_methods.RIVALS`, or of `estimator_runs.GRADIENTS` with the settings of estimator_rows.py.
tuned: what differs by budget, from the budget named on. Swept with --sweep, RATES and their neighbours: the preset and
MaskLLM + KD up to 2500 passes, MaskLLM from 2500 on, STE at 160 and 640, SR-STE and ProxSparse (its strength, too) at
160. What was tried is in docs/rivals.md; the rest are first guesses.
"""
from estimator_rows import PRESET, SOFT, SWAPS

BUDGETS = (160, 640, 2500)
TEXT = dict(batchsize=8, fresh=True)  # text that no run repeats, as the preset's
RATES = {"straight_through": (1.2, 1.8, 2.5, 3.6), "momentum": (0.3, 0.5, 0.8), "maskllm": (0.001, 0.002, 0.004, 0.008),
         "scores_ste": (0.005, 0.01, 0.02, 0.04), "sr_ste": (3e-4, 1e-3, 3e-3), "proxsparse": (3e-4, 1e-3, 3e-3)}
TUNED = {160: dict(lr=1.2), 640: dict(lr=1.8), 2500: dict(lr=1.8, batchsize=16), 10000: dict(lr=2.5, batchsize=32)}
TUNED_SOFT = {160: dict(lr=1.5, soft=False), 640: dict(lr=3.0), 2500: dict(lr=3.0, batchsize=16),
              10000: dict(lr=2.0, logits=0.5, batchsize=32)}
STE = dict(learner="scores_ste", distill=1.0, **TEXT, tuned={
    160: dict(lr=0.04), 640: dict(lr=0.01), 2500: dict(lr=0.005), 10000: dict(lr=0.005, batchsize=32)})
MASKLLM = dict(learner="maskllm", distill=1.0, **TEXT, tuned={160: dict(lr=0.001), 2500: dict(lr=0.002, batchsize=32)})
ROWS = {
    "--preset fast": PRESET,
    "the preset with its rate tuned": dict(PRESET, tuned=TUNED),
    "steps by block and soft masks from 640 passes on": dict(SOFT, tuned=TUNED_SOFT),
    "steps by block and soft masks from 640 passes on, no KD": dict(SOFT, distill=0.0, tuned={
        **TUNED_SOFT, 640: dict(lr=2.0, logits=1.0), 2500: dict(lr=2.0, logits=0.5, batchsize=16)}),
    "the preset without curvature": dict(SWAPS, tuned=TUNED),
    "the preset with its rate tuned and KD 0.5": dict(PRESET, distill=0.5, tuned={
        **TUNED, 2500: dict(lr=3.6, batchsize=16)}),
    "STE on scores + Adam + KD": STE,
    "STE on scores + Adam + KD 0.5": dict(STE, distill=0.5),
    "STE on scores + Adam": dict(STE, distill=0.0),
    "MaskLLM": dict(MASKLLM, distill=0.0, tuned={
        **MASKLLM["tuned"], 640: dict(lr=6e-4), 10000: dict(lr=0.001, batchsize=32)}),
    "MaskLLM + KD": MASKLLM,
    "MaskLLM + KD 0.5": dict(MASKLLM, distill=0.5),
    "ProxSparse": dict(learner="proxsparse", strength=200.0, **TEXT, tuned={
        160: dict(lr=3e-4), 2500: dict(lr=3e-4, batchsize=32)}),
    "SR-STE": dict(learner="sr_ste", **TEXT, tuned={
        160: dict(lr=1e-3), 2500: dict(lr=1e-3, batchsize=32)}),
}
STUDY = {  # of the long run: the preset with its rate tuned, and what one change makes of it
    "the preset with its rate tuned": ROWS["the preset with its rate tuned"],
    "no curvature": ROWS["the preset without curvature"],
    "curvature at the end": dict(PRESET, ramp=(0.75, 0.9), tuned=TUNED),
    "curvature growing over the run": dict(PRESET, ramp=(0.0, 1.0), tuned=TUNED),
    "curvature throughout": dict(PRESET, ramp=(0.0, 0.0), tuned=TUNED),
    "steps by block": dict(PRESET, normalize_gradient="block", tuned={
        160: dict(lr=1.5), 2500: dict(lr=1.5, batchsize=16)}),
    "soft masks": dict(PRESET, soft=True, tuned=TUNED),
    "soft masks, steps by block": dict(SOFT, tuned=TUNED_SOFT),
    "MaskLLM + KD": MASKLLM,
    "MaskLLM + KD, no Gumbel noise": dict(MASKLLM, changed=dict(gumbel=0.0)),
    "MaskLLM + KD, no reward for the norm": dict(MASKLLM, changed=dict(norm_reward=0.0)),
    "MaskLLM + KD, temperature from 1": dict(MASKLLM, changed=dict(temperatures=(1.0, 0.05))),
    "MaskLLM + KD, Adam without momentum": dict(MASKLLM, changed=dict(betas=(0.0, 0.95))),
    "no curvature, momentum 0.9, its rate lowered": dict(SWAPS, learner="momentum", tuned={
        160: dict(lr=0.5), 640: dict(lr=0.8)}),
}


def setting_of(rows: dict[str, dict], name: str, passes: int) -> dict:
    """A row's setting at a budget: with what is tuned for the largest budget that is not above it, or the smallest."""
    setting = {key: value for key, value in rows[name].items() if key != "tuned"}
    tuned = rows[name].get("tuned", {})
    budgets = sorted(tuned)
    fitting = [budget for budget in budgets if budget <= passes] or budgets[:1]
    return {**setting, **(tuned[fitting[-1]] if fitting else {})}
