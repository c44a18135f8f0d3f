#!/usr/bin/env bash
# What docs/after.md brings on SmolLM2-135M at 2:4: fine-tuning that keeps the zeros, and int8. Needs the model and text
# that `make demo DEMO_FLAGS=--quick` and reproduce/real_text.py leave in demo/. An hour on two cores.
#
#   HELDOUT=WIKITEXT bash reproduce/after.sh
#   python reproduce/record.py results/reproduce-after --out reproduce/records/after.json
#
# HELDOUT: see reproduce/smollm2.sh. The same models on another text:
#
#   MODELS=results/reproduce-after/2of4 OUT=results/reproduce-after-brown HELDOUT=demo/real/brown-unseen.txt \
#       bash reproduce/after.sh
#   python reproduce/record.py results/reproduce-after-brown --out reproduce/records/after_brown.json
DEMO=1 SMALL=0 RECORD=1 NWINDOWS=64
: "${OUT:=results/reproduce-after}" "${STEPS:=20}"
. "$(dirname "$0")/common.sh"

sparsity_type 2:4
dense
models=${MODELS:-$folder} sparse=sparsify-steps$STEPS
ran "$models/$sparse/report.json" "$models/$sparse" sparsify.py --model "$MODEL" --steps "$STEPS"
once "$models/finetuned" reproduce/after.py fine-tune --run "$models/$sparse" --out "$models/finetuned" \
    --text demo/train.jsonl demo/real/{brown,essays}.jsonl
once "$models/int8" reproduce/after.py quantise --run "$models/$sparse" --out "$models/int8"
for model in "$sparse" finetuned int8; do
    evaluated "$folder/$model" --model "$models/$model" --sparsity_type "$n_m"
done
table after
