#!/usr/bin/env bash
# The learning rate eta. VALUES="25 50" for other rates.
. "$(dirname "$0")/common.sh"
sparsity_type 2:4
dense
pruned wanda
for lr in ${VALUES:-10 25 50 100 200}; do
    learned maskpro "$SIZE" "$lr" "$LOGITS"
done
table learning_rate
