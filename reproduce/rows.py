"""The rows of the records in reproduce/records/ that tables and pictures show, with their labels
there."""


def small(
    method: str, size: int, lr: float, logits: float, further: str = "", steps: int = 2500
) -> str:
    """Return the name of a row of SMALL=1 at 1:4, as in reproduce/common.sh."""
    return f"1of4/{method}-size{size}-lr{lr}-logits{logits}-steps{steps}{further}"


# what is varied, what the paper says, arguments of `small` for the record's row, number of seeds
# (None: all)
ABLATIONS = [
    (
        "maskpro, η 5, C 5, 512 sequences, cached baseline",
        "learns, steadily",
        ("maskpro", 512, 5, 5),
        None,
    ),
    ("residual", "learns, unsteadily", ("residual", 512, 5, 5), None),
    ("vanilla", "does not learn", ("vanilla", 512, 5, 5), None),
    ("vanilla, η 0.05, seed 0", "", ("vanilla", 512, 0.05, 5), 1),
    ("1 sequence", "enough to learn from", ("maskpro", 1, 5, 5), 1),
    ("32 sequences", "", ("maskpro", 32, 5, 5), 1),
    ("η 2", "", ("maskpro", 512, 2, 5), 1),
    ("η 10", "", ("maskpro", 512, 10, 5), 1),
    ("C 2", "too small a C fails", ("maskpro", 512, 5, 2), 1),
    ("C 10", "its setting", ("maskpro", 512, 5, 10), 1),
    (
        "[less of the prior](steps.md#less-of-the-prior), η 5, C 5",
        "",
        ("maskpro-prior", 512, 5, 5),
        1,
    ),
    ("the same, η 2", "", ("maskpro-prior", 512, 2, 5), 1),
    ("the same, C 10", "", ("maskpro-prior", 512, 5, 10), 1),
    ("online baseline: the mask of the cached one", "", ("maskpro", 512, 5, 5, "-online"), 1),
    (
        "[random logits](#random-logits), C 5",
        "feasible, takes longer",
        ("maskpro-random", 512, 5, 5, "-online"),
        None,
    ),
    ("the same, 10,000 steps", "", ("maskpro-random", 512, 5, 5, "-online", 10000), 1),
    ("from m0, 10,000 steps", "", ("maskpro", 512, 5, 5, "", 10000), 1),
]
MASKPRO = {
    steps: f"2of4/maskpro-size512-lr{eta}-logits5-steps{steps}"
    for steps, eta in ((2000, 0.6), (10000, 0.3))
}
LAYER = "2of4/maskpro-layer{}-size512-lr2-logits5-steps10000"
RESULTS = [  # rows of smollm2.sh that were run: what was done, the weights, the record's row
    ("dense", "", "dense"),
    (
        (
            "`sparsify.py`, a quarter [questions](sparsify.md#accuracy), the rest [after "
            "passages](sparsify.md#passages), 280 steps"
        ),
        "frozen",
        "2of4/sparsify-allafter-both-steps280",
    ),
    (
        (
            "the same, [channels reordered](permutations.md), "
            "[two hours](sparsify.md#a-runs-report), 459 steps"
        ),
        "frozen",
        "2of4/sparsify-permuted-allafter-both-minutes120",
    ),
    (
        "the first, [half an hour](sparsify.md#a-runs-report), 99 steps",
        "frozen",
        "2of4/sparsify-allafter-both-minutes30",
    ),
    (
        "the same, channels reordered, 97 steps",
        "frozen",
        "2of4/sparsify-permuted-allafter-both-minutes30",
    ),
    (
        "half an hour on a faster CPU†, half of the text after passages",
        "frozen",
        "2of4/sparsify-both-minutes30",
    ),
    ("the same, channels reordered", "frozen", "2of4/sparsify-permuted-both-minutes30"),
    (
        (
            "STE with Adam, a quarter questions, two fifths (seed 0: half) after, 280 steps "
            "([rivals](rivals.md))"
        ),
        "frozen",
        "2of4/rival-scores_ste-lr0.01-both-steps280",
    ),
    ("MaskLLM, the same", "frozen", "2of4/rival-maskllm-lr0.001-both-steps280"),
    ("SparseGPT, true sequential", "updated", "2of4/sparsegpt"),
    ("Wanda, [swaps](one_shot_masks.md#swaps), true sequential", "frozen", "2of4/swaps-sequential"),
    (
        "MaskPro from Wanda's scores, [less of the prior](steps.md#less-of-the-prior), 600 steps",
        "frozen",
        "2of4/maskpro-scores-prior-size512-lr1.2-logits4-steps600",
    ),
    (
        "MaskPro [from C·m0](steps.md#on-a-real-model), C 5, η 0.3, 10,000 steps",
        "frozen",
        MASKPRO[10000],
    ),
    ("Wanda, m0", "frozen", "2of4/wanda"),
]
SUMMARY = [  # for the README: method, learns by, bytes of state per weight, the record's row
    ("dense", "", "", "dense"),
    ("Wanda", "one shot", "", "2of4/wanda"),
    ("SparseGPT", "one shot, changes weights", "", "2of4/sparsegpt"),
    ("MaskPro", "forward passes, 10,000 steps", "4.25", MASKPRO[10000]),
    ("MaskLLM", "backward passes, 280 steps", "24", "2of4/rival-maskllm-lr0.001-both-steps280"),
    ("STE with Adam", "the same", "16", "2of4/rival-scores_ste-lr0.01-both-steps280"),
    ("**ours**", "the same", "4.25", "2of4/sparsify-allafter-both-steps280"),
    (
        "**ours**, `--permute`",
        "459 steps",
        "4.25",
        "2of4/sparsify-permuted-allafter-both-minutes120",
    ),
]
ONE_SHOT = [  # as RESULTS
    ("dense", "", "dense"),
    ("magnitude", "frozen", "2of4/magnitude"),
    ("Wanda", "frozen", "2of4/wanda"),
    ("Wanda, swaps", "frozen", "2of4/swaps"),
    ("Wanda, swaps, true sequential", "frozen", "2of4/swaps-sequential"),
    ("Wanda, [channels reordered](permutations.md)", "frozen", "2of4/wanda-reordered"),
    ("SparseGPT, true sequential", "updated", "2of4/sparsegpt"),
]
RIVALS = [  # method, bytes of state per weight, the record's row
    ("ours", "4.25", "2of4/sparsify-both-steps280"),
    ("STE on scores with Adam", "16", "2of4/rival-scores_ste-lr0.01-both-steps280"),
    ("MaskLLM", "24", "2of4/rival-maskllm-lr0.001-both-steps280"),
    ("SUSI", "16", "2of4/rival-susi-lr0.001-both-steps280"),
    ("ours, all generated text after passages", "4.25", "2of4/sparsify-allafter-both-steps280"),
    ("ProxSparse, the same", "16", "2of4/rival-proxsparse-lr0.0003-allafter-both-steps280"),
    ("ours, channels reordered, 568 steps", "4.25", "2of4/sparsify-permuted-both-minutes120"),
    ("the STE, the same", "16", "2of4/rival-scores_ste-lr0.01-permuted-both-steps568"),
]
SIGNALS = (
    ("small", "variance"),
    ("SmolLM2-135M", "variance_smollm2"),
    ("the same, from scores", "variance_smollm2_scores"),
    ("its decoder layer 29", "variance_layer29"),
    ("its decoder layer 28", "variance_layer28"),
)
# a run, the record of its signal, the run's record and its row there (None: a record of one run)
FALLS = (
    ("small, 1:4", "variance", "small_model", "1of4/maskpro-size512-lr5-logits5-steps2500"),
    ("small, 2:4", "variance", "small_model", "2of4/maskpro-size512-lr5-logits5-steps10000"),
    ("SmolLM2-135M, 2:4", "variance_smollm2", "maskpro_lr0.03", None),
    ("the same", "variance_smollm2", "smollm2_float32", MASKPRO[10000]),
    ("the same", "variance_smollm2", "smollm2", MASKPRO[2000]),
    (
        "the same, from scores",
        "variance_smollm2_scores",
        "smollm2",
        "2of4/maskpro-scores-size512-lr1.2-logits4-steps600",
    ),
    ("its decoder layer 29, 2:4", "variance_layer29", "smollm2", LAYER.format(29)),
    ("its decoder layer 28, 2:4", "variance_layer28", "smollm2_float32", LAYER.format(28)),
)
