#!/usr/bin/env bash
# The learning rate eta. VALUES="25 50" for other rates.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
if [ "$SMALL" = 1 ]; then rates="2 5 10"; else rates="10 25 50 100 200"; fi
dense
pruned wanda
for lr in ${VALUES:-$rates}; do
    learned maskpro "$SIZE" "$lr" "$LOGITS"
done
table learning_rate
