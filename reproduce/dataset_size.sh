#!/usr/bin/env bash
# How many sequences of text learning needs, from one to the paper's 512; minibatches of 32 (DEMO=1, SMALL=1: 8), or of
# all where there are fewer. VALUES="1 512" for other sizes, each a multiple of the minibatch.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
sizes="1 32 128 320 512"
[ "$DEMO" = 0 ] || sizes="1 8 32 80 128"
[ "$SMALL" = 0 ] || sizes="1 32 512"
dense
pruned wanda
for size in ${VALUES:-$sizes}; do
    learned maskpro "$size" "$LR" "$LOGITS"
done
table dataset_size
