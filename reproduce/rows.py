"""The records in reproduce/records/, and the rows of them that tables and pictures show, with their
labels there."""

import json
from functools import cache
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "records"


@cache
def record(name: str) -> dict:
    """Read a file of reproduce/records/."""
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def small(
    method: str, size: int, lr: float, logits: float, further: str = "", steps: int = 2500
) -> str:
    """Return the name of a row of SMALL=1 at 1:4, as in reproduce/common.sh."""
    return f"1of4/{method}-size{size}-lr{lr}-logits{logits}-steps{steps}{further}"


# the setting, the record's row as `small` names it, how many of its seeds
ABLATIONS = [
    ("maskpro, η 5, C 5, 512 sequences, cached baseline", ("maskpro", 512, 5, 5), None),
    ("residual", ("residual", 512, 5, 5), None),
    ("vanilla", ("vanilla", 512, 5, 5), None),
    ("vanilla, η 0.05", ("vanilla", 512, 0.05, 5), 1),
    ("1 sequence", ("maskpro", 1, 5, 5), 1),
    ("32 sequences", ("maskpro", 32, 5, 5), 1),
    ("η 2", ("maskpro", 512, 2, 5), 1),
    ("η 10", ("maskpro", 512, 10, 5), 1),
    ("C 2", ("maskpro", 512, 5, 2), 1),
    ("C 10", ("maskpro", 512, 5, 10), 1),
    ("10,000 steps", ("maskpro", 512, 5, 5, "", 10000), 1),
    ("[less of the prior](steps.md#less-of-the-prior)", ("maskpro-prior", 512, 5, 5), 1),
    ("the same, η 2", ("maskpro-prior", 512, 2, 5), 1),
    ("the same, C 10", ("maskpro-prior", 512, 5, 10), 1),
    ("[random logits](#random-logits)", ("maskpro-random", 512, 5, 5, "-online"), None),
    ("the same, 10,000 steps", ("maskpro-random", 512, 5, 5, "-online", 10000), 1),
]
MASKPRO = {
    steps: f"2of4/maskpro-size512-lr{eta}-logits5-steps{steps}"
    for steps, eta in ((2000, 0.6), (10000, 0.3))
}
RESULTS = [  # rows of smollm2.sh: what was done, the record's row
    ("`sparsify.py`, 280 steps", "2of4/sparsify-allafter-both-steps280"),
    (
        "`sparsify.py --permute`, 459 steps, two hours",
        "2of4/sparsify-permuted-allafter-both-minutes120",
    ),
    ("`sparsify.py`, 99 steps, half an hour", "2of4/sparsify-allafter-both-minutes30"),
    (
        "`sparsify.py --permute`, 97 steps, half an hour",
        "2of4/sparsify-permuted-allafter-both-minutes30",
    ),
    ("STE with Adam, 280 steps, half", "2of4/rival-scores_ste-lr0.01-both-steps280"),
    ("MaskLLM, 280 steps, half", "2of4/rival-maskllm-lr0.001-both-steps280"),
]
# for the README: method, learns by, bytes of state per weight, the record's row
SUMMARY = [
    ("dense", "", "", "dense"),
    ("Wanda", "one shot", "", "2of4/wanda"),
    ("SparseGPT", "one shot, changes weights", "", "2of4/sparsegpt"),
    ("MaskPro", "forward passes, 10,000 steps", "4.25", MASKPRO[10000]),
    ("MaskLLM", "backward passes, 280 steps", "24", "2of4/rival-maskllm-lr0.001-real-steps280"),
    ("MaskLLM", "backward passes, 1,000 steps", "24", "2of4/rival-maskllm-lr0.001-real-steps1000"),
    (
        "straight-through (STE) with Adam",
        "backward passes, 280 steps",
        "16",
        "2of4/rival-scores_ste-lr0.01-real-steps280",
    ),
    (
        "STE with Adam",
        "backward passes, 1,000 steps",
        "16",
        "2of4/rival-scores_ste-lr0.01-real-steps1000",
    ),
    ("**ours**", "backward passes, 280 steps", "4.75", "2of4/sparsify-real-steps280"),
    (
        "**ours**",
        "the same, on text that the model writes",
        "4.75",
        "2of4/sparsify-generated-steps280",
    ),
    ("**ours**", "backward passes, 1,000 steps", "4.75", "2of4/sparsify-real-steps1000"),
]
# for the README's picture: the steps of runs, the record's rows, and those that are levels
STEPS = (280, 1000)
CURVES = {
    "ours": "2of4/sparsify-real-steps{}",
    "ours, text that the model writes": "2of4/sparsify-generated-steps{}",
    "MaskLLM": "2of4/rival-maskllm-lr0.001-real-steps{}",
    "STE with Adam": "2of4/rival-scores_ste-lr0.01-real-steps{}",
}
LEVELS = {"SparseGPT": "2of4/sparsegpt", "MaskPro, 10,000 steps": MASKPRO[10000]}
ONE_SHOT = [  # what was done, the record's row
    ("dense", "dense"),
    ("magnitude", "2of4/magnitude"),
    ("Wanda", "2of4/wanda"),
    ("Wanda, swaps", "2of4/swaps"),
    ("Wanda, swaps, true sequential", "2of4/swaps-sequential"),
    ("Wanda, [channels reordered](permutations.md)", "2of4/wanda-reordered"),
    ("SparseGPT (updates weights), true sequential", "2of4/sparsegpt"),
]
AFTER = (  # rows of after.sh
    ("dense", "dense"),
    ("`sparsify.py --steps 20`", "2of4/sparsify-steps20"),
    ("the same, fine-tuned: weights updated", "2of4/finetuned"),
    ("the same with int8 weights, not fine-tuned", "2of4/int8"),
)
SIGNALS = (
    ("small", "variance"),
    ("SmolLM2-135M", "variance_smollm2"),
    ("SmolLM2-135M, from scores", "variance_smollm2_scores"),
)
# a run, the record of its signal, the run's record and its row there (None: a record of one run)
FALLS = (
    ("small, 1:4", "variance", "small_model", "1of4/maskpro-size512-lr5-logits5-steps2500"),
    ("small, 2:4", "variance", "small_model", "2of4/maskpro-size512-lr5-logits5-steps10000"),
    ("SmolLM2-135M", "variance_smollm2", "maskpro_lr0.03", None),
    ("SmolLM2-135M", "variance_smollm2", "smollm2_float32", MASKPRO[10000]),
    ("SmolLM2-135M", "variance_smollm2", "smollm2", MASKPRO[2000]),
    (
        "SmolLM2-135M, from scores",
        "variance_smollm2_scores",
        "smollm2",
        "2of4/maskpro-scores-size512-lr1.2-logits4-steps600",
    ),
)
