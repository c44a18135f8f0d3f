#!/usr/bin/env bash
# What the advantage is made of: the loss (vanilla), the loss less m0's (residual), and that less its moving average
# (maskpro). VALUES="vanilla maskpro" for some only, SEEDS="0 1 2" for several draws of each.
. "$(dirname "$0")/common.sh"
sparsity_type "$N_M"
dense
pruned wanda
if [ "$SMALL" = 1 ]; then seeds="0 1 2"; else seeds=0; fi
for estimator in ${VALUES:-vanilla residual maskpro}; do
    for SEED in ${SEEDS:-$seeds}; do
        learned "$estimator" "$SIZE" "$LR" "$LOGITS"
    done
done
table estimators
