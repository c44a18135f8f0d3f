#!/usr/bin/env bash
# Does learning without any sparse model, from random logits, take longer than from m0? VALUES=random for that alone,
# SEEDS="0 1 2" for several draws of each.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
dense
pruned wanda
if [ "$SMALL" = 1 ]; then seeds="0 1 2"; else seeds=0; fi
for start in ${VALUES:-mask random}; do
    for SEED in ${SEEDS:-$seeds}; do
        case $start in
            mask) learned maskpro "$SIZE" "$LR" "$LOGITS" ;;
            random) AS=random FURTHER="--init random" learned maskpro "$SIZE" "$LR" "$LOGITS" online ;;
            *) stop "VALUES are mask and random, not $start" ;;
        esac
    done
done
table random_start
