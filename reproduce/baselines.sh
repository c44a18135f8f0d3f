#!/usr/bin/env bash
# Where f(m0) comes from: cached, or a second forward pass, in the first epoch. VALUES="online" for one only.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
dense
pruned wanda
for baseline in ${VALUES:-cached online}; do
    learned maskpro "$SIZE" "$LR" "$LOGITS" "$baseline"
done
table baselines
