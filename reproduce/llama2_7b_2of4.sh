#!/usr/bin/env bash
# The paper's main comparison, 2:4 on Llama-2-7B: dense, the one-shot methods (sparsegpt with its own, updated weights)
# and the learned mask. The last row is this project's and not in the paper. Needs a GPU of 80 GB, and
# 130 GB of disk: three pruned models, and the states of a run, 83 GB.
. "$(dirname "$0")/common.sh"
sparsity_type 2:4
dense
for method in magnitude wanda sparsegpt; do
    pruned "$method"
done
learned maskpro "$SIZE" "$LR" "$LOGITS"
ours
table llama2_7b_2of4
