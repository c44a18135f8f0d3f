#!/usr/bin/env bash
# What docs/after.md brings on SmolLM2-135M at 2:4: fine-tuning that keeps the zeros, and int8. Needs the model and text
# that `make demo DEMO_FLAGS=--quick` and reproduce/real_text.py leave in demo/. An hour on two cores.
#
#   HELDOUT=WIKITEXT bash reproduce/after.sh
#
# HELDOUT: see reproduce/smollm2.sh. Afterwards:
# python reproduce/record.py results/reproduce-after --out reproduce/records/after.json
DEMO=1 SMALL=0 RECORD=1 NWINDOWS=64
: "${OUT:=results/reproduce-after}" "${STEPS:=20}"
. "$(dirname "$0")/common.sh"

sparsity_type 2:4
dense
sparse=$folder/sparsify-steps$STEPS
ran "$sparse/report.json" "$sparse" sparsify.py --model "$MODEL" --steps "$STEPS"
evaluated "$sparse" --model "$sparse"
once "$folder/finetuned" reproduce/after.py fine-tune --run "$sparse" --out "$folder/finetuned" \
    --text demo/train.jsonl demo/real/{brown,essays}.jsonl
evaluated "$folder/finetuned" --model "$folder/finetuned" --sparsity_type "$n_m"
once "$folder/int8" reproduce/after.py quantise --run "$sparse" --out "$folder/int8"
evaluated "$folder/int8" --model "$folder/int8" --sparsity_type "$n_m"
table after
