"""One-shot pruning on calibration text, and orders of channels that let a mask keep more."""
