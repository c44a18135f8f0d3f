#!/usr/bin/env bash
# The initial logit C of a kept weight: how far the first distributions are from m0. VALUES="5 10" for other values.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
if [ "$SMALL" = 1 ]; then values="2 5 10"; else values="1 2 5 10 20"; fi
dense
pruned wanda
for logits in ${VALUES:-$values}; do
    learned maskpro "$SIZE" "$LR" "$logits"
done
table logits
