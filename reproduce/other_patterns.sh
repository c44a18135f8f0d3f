#!/usr/bin/env bash
# Other patterns than 2:4, with SMALL=1 that one too. VALUES="4:8 2:8" for other ones.
. "$(dirname "$0")/common.sh"
if [ "$SMALL" = 1 ]; then patterns="1:4 2:4 4:8"; else patterns="4:8 1:4"; fi
dense
for n_of_m in ${VALUES:-$patterns}; do
    sparsity_type "$n_of_m"
    for method in magnitude wanda sparsegpt; do
        pruned "$method"
    done
    learned maskpro "$SIZE" "$LR" "$LOGITS"
done
table other_patterns
