#!/usr/bin/env bash
# What more time brings: MaskPro and sparsify.py, each for several numbers of steps, beside the one-shot masks.
# reproduce/picture.py draws it.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
dense
for method in magnitude wanda sparsegpt; do
    pruned "$method"
done
if [ "$SMALL" = 1 ]; then steps="500 1000 2500 10000" ours="32 128 512"; else steps="100 1000 10000" ours="30 100 300"; fi
for STEPS in ${VALUES:-$steps}; do
    learned maskpro "$SIZE" "$LR" "$LOGITS"
done
for STEPS in ${OURS:-$ours}; do
    ours
done
table minutes
