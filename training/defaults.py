"""What sparsify.py and its function for notebooks start from. Nothing here imports torch."""

STEPS = 300
STEP_SIZE = 0.8  # total movement of a logit under pure noise, in logits
LOGITS = 4.0  # C: scale of the first logits
GIVEN_SHARE = 0.5  # of distillation in the loss, on given text
GENERATED_SHARE = 1.0  # the same on text that the model generates
WINDOW = 512  # tokens in a window of --ppl, at most
WINDOWS = 64  # of each text of --ppl
EVALUATIONS = 10  # of the held-out loss, in a run
