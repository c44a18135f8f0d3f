"""Defaults of sparsify.py and of its function for notebooks. Nothing here imports torch."""

STEPS = 300
STEP_SIZE = 0.6  # total movement of a logit under pure-noise gradients, in logits
LOGITS = 4.0  # C: scale of the first logits
GIVEN_SHARE = 0.5  # share of distillation in the loss, on given text
GENERATED_SHARE = 1.0  # the same on text that the model generates
WINDOW = 512  # tokens per window of --ppl, at most
WINDOWS = 64  # windows per text of --ppl, at most
EVALUATIONS = 10  # of the held-out loss, per run
