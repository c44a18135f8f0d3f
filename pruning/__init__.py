"""One-shot masks: what calibration text says of a layer's inputs, and the methods that choose weights by it."""
