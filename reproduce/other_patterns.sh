#!/usr/bin/env bash
# Other patterns than 2:4. VALUES="4:8 2:8" for other ones.
. "$(dirname "$0")/common.sh"
dense
for n_of_m in ${VALUES:-4:8 1:4}; do
    sparsity_type "$n_of_m"
    for method in magnitude wanda sparsegpt; do
        pruned "$method"
    done
    learned maskpro "$SIZE" "$LR" "$LOGITS"
done
table other_patterns
