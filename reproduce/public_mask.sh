#!/usr/bin/env bash
# sparsify.py against a mask that others have published: the dense model, Wanda's mask, the public MaskLLM mask, and
# sparsify.py's after 300, 3,000 and 30,000 steps, in one table. Needs the Hub and a GPU.
#
# PATCH's authors report for Llama-3.2-1B, at 4096 tokens: dense 9.06, Wanda 78.18, this MaskLLM mask 12.93
# (arXiv 2509.23410). PUBLIC is the hub id of a repository with mask.npz, or a mask file; give MODEL with it. For
# Qwen2.5-0.5B they report 15.22 (dense 12.08, Wanda 72.48), but had published no MaskLLM mask when this was written.
: "${MODEL:=meta-llama/Llama-3.2-1B}" "${PUBLIC:=mohammad-mozaffari/llama_3.2_1b-MaskLLM-50Sparse}"
: "${OUT:=results/reproduce-public}" "${DTYPE:=bfloat16}"
. "$(dirname "$0")/common.sh"
sparsity_type 2:4
dense
pruned wanda
if [ -e "$PUBLIC" ]; then
    mask=$PUBLIC
else
    mask=$OUT/public/mask.npz
    once "$mask" -m huggingface_hub.cli.hf download "$PUBLIC" mask.npz --local-dir "$OUT/public"
fi
evaluated "$folder/public" --model "$MODEL" --mask "$mask" --sparsity_type "$n_m"
for STEPS in ${VALUES:-300 3000 30000}; do
    ours
done
table public_mask
