#!/usr/bin/env bash
# What the advantage is made of: the loss (vanilla), the loss less m0's (residual), and that less its moving average
# (maskpro). VALUES="vanilla maskpro" for some only.
. "$(dirname "$0")/common.sh"
sparsity_type 2:4
dense
pruned wanda
for estimator in ${VALUES:-vanilla residual maskpro}; do
    learned "$estimator" "$SIZE" "$LR" "$LOGITS"
done
table estimators
