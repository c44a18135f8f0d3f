#!/usr/bin/env bash
# Results on a real model: SmolLM2-135M at 2:4, which `make demo DEMO_FLAGS=--quick` leaves in demo/. Accuracies and
# reordered channels need `make reproduce-env`.
#
#   HELDOUT=WIKITEXT VALUES=after SEEDS=0 bash reproduce/smollm2.sh                        # one row
#   HELDOUT=WIKITEXT VALUES="maskpro scores" SEEDS=0 bash reproduce/smollm2.sh             # 80 and 45 minutes
#   HELDOUT=WIKITEXT VALUES=maskpro STEPS=10000 ETA=0.3 SEEDS=0 bash reproduce/smollm2.sh  # 9 hours
#
# and rows of docs/results.md, for which no item that is learned from is evaluated:
#
#   for name in piqa arc_easy; do
#       awk 'NR % 2' $name.jsonl > $name-odd.jsonl; awk 'NR % 2 == 0' $name.jsonl > $name-even.jsonl
#   done
#   HELDOUT=WIKITEXT VALUES="after both scores_prior one_shot" QUESTIONS="piqa-even.jsonl arc_easy-even.jsonl" \
#       TASK_FILES="piqa-odd.jsonl arc_easy-odd.jsonl" bash reproduce/smollm2.sh
#
# Other rows: prior and scores_prior, MaskPro's masks with less of C * m0; minutes and minutes_permuted, half an hour if
# no MINUTES=120 is given (run them alone); on the text and m0 of `both` scores_ste, maskllm, roi: hours.
# STEPS=2000: of runs of sparsify.py and its rivals, 280 steps if not given.
#
# Real text, which reproduce/real_text.py leaves in demo/real; three texts are evaluated, see "nats" in the record:
#
#   OUT=results/real HELDOUT=WIKITEXT VALUES="real scores_ste maskllm roi" LIKE=real SEEDS=0 bash reproduce/smollm2.sh
#
# These are the other rows of the README's table, with TASK_FILES as above; VALUES=generated is the row of text that the
# model writes. The same masks on other prose:
#
#   mkdir -p results/brown/2of4 && ln -s "$PWD"/results/real/2of4/*/ results/brown/2of4
#   OUT=results/brown HELDOUT=demo/real/brown-unseen.txt VALUES=... LIKE=real SEEDS=0 bash reproduce/smollm2.sh
#
# DISTILL=0: another share of distillation than 0.5. LIKE: the row whose text, m0 and arguments the rivals take.
#
# All commands for one OUT, results/reproduce-smollm2, must name the same HELDOUT, QUESTIONS and TASK_FILES, if any.
# HELDOUT is a text file, of which 64 windows of 512 tokens are evaluated, such as WikiText-2's validation set.
# reproduce/articles.jsonl has twelve short articles, made up for this in the manner of WikiText. Afterwards:
# python reproduce/record.py results/reproduce-smollm2 --out reproduce/records/smollm2.json
# "allafter" in a row's name: all generated text continues passages; in rows of the records without it half did, or less.
if [ "${HELDOUT:-demo/heldout.txt}" = demo/heldout.txt ]; then  # before anything is written
    echo "error: give HELDOUT=FILE, a text to evaluate on that is not the demo's; the tables have WikiText-2's:" \
        "git clone --depth 1 https://github.com/pytorch/examples, then" \
        "HELDOUT=examples/word_language_model/data/wikitext-2/valid.txt" >&2
    exit 2
fi
DEMO=1 SMALL=0 RECORD=1 SEQUENTIAL='' NWINDOWS=64
maskpro_steps=${STEPS:-2000}
: "${OUT:=results/reproduce-smollm2}" "${SIZE:=512}" "${STEPS:=280}" "${MINUTES:=30}"
. "$(dirname "$0")/common.sh"

sparsified() {  # sparsified ROW FLAGS...: its sparse model, which a new order of channels may be part of
    local run=$folder/sparsify-$1$(of_seed)
    shift
    ran "$run/report.json" "$run" sparsify.py --model "$MODEL" --seed "$SEED" "$@"
    evaluated "$run" --model "$run"
}

with_questions() {  # with_questions ROW FLAGS...: of text after passages and of questions
    : "${QUESTIONS:?give files of questions, none of which is evaluated}"
    if [ -e "$folder/questions" ] && [ "$(cat "$folder/questions")" != "$QUESTIONS" ]; then
        stop "$folder has rows of other QUESTIONS; give another OUT="
    fi
    [ "$DRY" = 1 ] || echo "$QUESTIONS" > "$folder/questions"
    sparsified "$@" --after reproduce/articles.jsonl --dataset $QUESTIONS
}

rival() {  # rival METHOD RATE: with the arguments, the text and the m0 of LIKE, by default `both`
    local run=$folder/rival-$1-lr$2-${LIKE:-allafter-both}${DISTILL:+-distill$DISTILL}-steps$STEPS$(of_seed)
    ran "$run/mask.safetensors" "$run" "reproduce/rival.py $1" --like "${run/rival-$1-lr$2/sparsify}" --lr "$2"
    evaluated "$run" --model "$MODEL" --mask "$run/mask.safetensors"
}

sparsity_type 2:4
dense
pruned wanda
for SEED in ${SEEDS:-0 1 2}; do
    for row in ${VALUES:-after}; do
        case $row in
        after) sparsified "allafter-steps$STEPS" --steps "$STEPS" --after reproduce/articles.jsonl ;;
        both) with_questions "allafter-both-steps$STEPS" --steps "$STEPS" ;;
        real) sparsified "real${DISTILL:+-distill$DISTILL}-steps$STEPS" --steps "$STEPS" --distill "${DISTILL:-0.5}" \
                --dataset demo/train.jsonl demo/real/{brown,essays}.jsonl \
                --ppl "$HELDOUT" demo/heldout.txt demo/real/brown-unseen.txt ;;
        generated) sparsified "generated-steps$STEPS" --steps "$STEPS" \
                --ppl "$HELDOUT" demo/heldout.txt demo/real/brown-unseen.txt ;;
        minutes) with_questions "allafter-both-minutes$MINUTES" --minutes "$MINUTES" ;;
        minutes_permuted) with_questions "permuted-allafter-both-minutes$MINUTES" --minutes "$MINUTES" --permute ;;
        scores_ste) rival scores_ste "${ETA:-0.01}" ;;
        maskllm | roi) rival "$row" "${ETA:-0.001}" ;;
        maskpro) STEPS=$maskpro_steps learned maskpro "$SIZE" "${ETA:-0.6}" 5 ;;  # docs/steps.md
        prior) AS=prior FURTHER="--val_fraction 0.0625" STEPS=500 learned maskpro "$SIZE" "${ETA:-1}" 7 ;;
        scores) AS=scores FURTHER="--init scores --debias_tracker" STEPS=600 learned maskpro "$SIZE" "${ETA:-1.2}" 4 ;;
        scores_prior) AS=scores-prior FURTHER="--init scores --debias_tracker --val_fraction 0.0625" STEPS=600 \
                learned maskpro "$SIZE" "${ETA:-1.2}" 4 ;;
        one_shot)  # docs/one_shot_masks.md, docs/permutations.md
            pruned magnitude
            pruned wanda swaps --swaps 6
            pruned wanda swaps-sequential --swaps 6 --true_sequential
            once "$folder/order" permute.py --model "$MODEL" --dtype "$DTYPE" --sparsity_type "$n_m" \
                "${calibration[@]}" --save_model "$folder/order"
            MODEL=$folder/order pruned wanda wanda-reordered ;;
        *) stop "there is no row $row" ;;
        esac
    done
done
calibration+=(--true_sequential)
pruned sparsegpt
table smollm2
