"""The rows of bench/rivals.py: which method each is, its settings, and its rate at each budget.

learner: a key of `rival_methods.RIVALS`, or of `estimator_runs.GRADIENTS` with the settings of estimator_rows.py.
tuned: what differs by budget, from the budget named on; chosen with --sweep.
"""
from estimator_rows import PRESET

BUDGETS = (160, 640, 2500)
TEXT = dict(batchsize=8, fresh=True)  # text that no run repeats, as the preset's
WIDE = dict(batchsize=32)
RATES = {"straight_through": (0.8, 1.2, 1.8, 2.5), "maskllm": (1e-3, 2e-3, 4e-3, 8e-3),
         "scores_ste": (0.005, 0.01, 0.02, 0.04), "sr_ste": (3e-4, 1e-3, 3e-3), "proxsparse": (3e-4, 1e-3, 3e-3)}
ROWS = {
    "--preset fast": PRESET,
    "--preset fast, its rate tuned": dict(PRESET, tuned={160: dict(lr=1.2)}),
    "scores, straight-through, Adam, KD": dict(learner="scores_ste", distill=1.0, **TEXT, tuned={160: dict(lr=0.02)}),
    "MaskLLM": dict(learner="maskllm", **TEXT, tuned={160: dict(lr=4e-3)}),
    "MaskLLM, KD": dict(learner="maskllm", distill=1.0, **TEXT, tuned={160: dict(lr=4e-3)}),
    "ProxSparse": dict(learner="proxsparse", **TEXT, tuned={160: dict(lr=1e-3, strength=50.0)}),
    "SR-STE": dict(learner="sr_ste", **TEXT, tuned={160: dict(lr=1e-3)}),
}
STUDY: dict[str, dict] = {}


def setting_of(rows: dict[str, dict], name: str, passes: int) -> dict:
    """A row's setting at a budget: with what is tuned for the largest budget that is not above it, or the smallest."""
    setting = {key: value for key, value in rows[name].items() if key != "tuned"}
    tuned = rows[name].get("tuned", {})
    budgets = sorted(tuned)
    fitting = [budget for budget in budgets if budget <= passes] or budgets[:1]
    return {**setting, **(tuned[fitting[-1]] if fitting else {})}
