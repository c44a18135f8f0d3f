# Sourced by the scripts of this folder: the settings, and the steps. The settings are the paper's; with DEMO=1 the
# demo's; with SMALL=1 the paper's scaled to reproduce/small_model, where they learn in minutes on a CPU, from the
# demo's text.
#
# A script says for which pattern, names the rows of its table with `dense`, `pruned`, `learned` and `ours`, and ends
# with `table`. What a row needs is made first, if it is not there yet: all scripts of a mode share $OUT, so nothing is
# computed twice, and a script that was interrupted goes on where it stopped. DRY=1 prints the commands left to run.
# Every setting can be given in the environment, MODEL=... STEPS=... bash reproduce/estimators.sh; paths in it are
# relative to the root of the repository.
#
# PYTHON is by default that of .venv-lock, the exact versions of requirements-lock.txt, which `make reproduce-env`
# installs; without that folder it is that of .venv (`make demo`; no accuracies, no scipy), or else `python`, `python3`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for python in .venv-lock/bin/python .venv/bin/python python python3; do
    if [ -z "${PYTHON:-}" ] && command -v "$python" > /dev/null; then PYTHON=$python; fi
done
: "${DRY:=0}" "${DEMO:=0}" "${SMALL:=0}" "${RECORD:=$SMALL}" "${SQLEN:=128}"
[ "$SMALL" = 0 ] || : "${LR:=5}" "${LOGITS:=5}" "${N_M:=1:4}"
: "${LR:=50}" "${LOGITS:=10}" "${N_M:=2:4}"  # what the studies of one pattern are of
if [ "$DEMO" = 1 ]; then  # what `make demo` leaves in demo/, in minutes on a CPU
    : "${OUT:=results/reproduce-demo}" "${MODEL:=demo/model}" "${DTYPE:=auto}"
    : "${TRAIN_TEXT:=demo/train.jsonl}" "${NSAMPLES:=64}" "${CALIBRATION_SEQLEN:=256}"
    : "${SIZE:=128}" "${BATCHSIZE:=8}" "${STEPS:=48}" "${HELDOUT:=demo/heldout.txt}" "${SEQLEN:=512}"
    protocol=(--ppl "$HELDOUT" --seqlen "$SEQLEN" --nwindows "${NWINDOWS:=32}")
elif [ "$SMALL" = 1 ]; then  # bytes for tokens; text and windows are those of bench/rivals.py
    : "${OUT:=results/reproduce-small}" "${MODEL:=reproduce/small_model}" "${DTYPE:=float32}"
    : "${TRAIN_TEXT:=demo/train.jsonl}" "${NSAMPLES:=128}" "${CALIBRATION_SEQLEN:=128}"
    : "${SIZE:=512}" "${BATCHSIZE:=8}" "${STEPS:=2500}" "${HELDOUT:=demo/heldout.txt}" "${SEQLEN:=128}"
    protocol=(--ppl "$HELDOUT" --seqlen "$SEQLEN" --nwindows "${NWINDOWS:=256}")
else
    : "${OUT:=results/reproduce}" "${MODEL:=meta-llama/Llama-2-7b-hf}" "${DTYPE:=float16}"
    : "${TRAIN_TEXT:=allenai/c4}" "${NSAMPLES:=128}" "${CALIBRATION_SEQLEN:=2048}"
    : "${SIZE:=512}" "${BATCHSIZE:=32}" "${STEPS:=10000}" "${HELDOUT:=wikitext2}" "${SEQLEN:=4096}"
    : "${TASKS:=hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa}"
    protocol=(--ppl "$HELDOUT" --seqlen "$SEQLEN" --tasks "$TASKS" --tasks_no_bos)  # no BOS, as in older figures
fi
# the sequential pass: later layers are calibrated on the pruned earlier ones, where Wanda's and SparseGPT's own code
# measures a decoder block before it prunes its layers
calibration=(--dataset "$TRAIN_TEXT" --nsamples "$NSAMPLES" --seqlen "$CALIBRATION_SEQLEN"
    ${SEQUENTIAL---true_sequential})
rows=() planned=" "  # the table's records; outputs made or, with DRY=1, printed by now
: "${SEED:=0}"  # of the draws of `learned`

stop() {
    echo "error: $*" >&2
    exit 2
}

[ -z "${TASK_FILES:-}" ] || protocol+=(--task_file $TASK_FILES)  # files of items, for accuracy

# one $OUT, one protocol; what its files are named by, such as STEPS, may vary
settings="$MODEL $DTYPE; ${calibration[*]}; batchsize $BATCHSIZE, sqlen $SQLEN; ${protocol[*]}"
if [ "$DRY" = 0 ]; then
    for file in "$MODEL" "$TRAIN_TEXT" "$HELDOUT"; do
        [[ $file != demo/* || -e $file ]] || stop "there is no $file; \`make demo DEMO_FLAGS=--quick\` makes it"
    done
    mkdir -p "$OUT"
    [ -e "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
fi
if [ -e "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$settings" ]; then
    stop "what is in $OUT was made with other settings, see $OUT/settings; give another OUT="
fi

once() {  # once OUTPUT SCRIPT FLAGS...: run a script of the repository unless its output is there
    local output=$1
    shift
    if [ -e "$output" ] || [[ $planned == *" $output "* ]]; then return; fi
    planned="$planned$output "
    echo "\$ python $*"
    [ "$DRY" = 1 ] || "$PYTHON" "$@"
}

ran() {  # ran OUTPUT RUN "SCRIPT [METHOD]" FLAGS...: a run, up to this output of it; one that was stopped goes on
    local output=$1 run=$2 script=$3
    shift 3
    if [ -e "$run" ] && ! grep -qs '"summary":' "$run/run.json"; then  # it may have its output and not be finished
        if [ "$DRY" = 1 ]; then echo "\$ python $script --resume $run"; return; fi
        rm -f "$output"
        once "$output" $script --resume "$run"
    fi
    once "$output" $script "$@" --out "$run"
}

evaluated() {  # evaluated NAME FLAGS...: a row of the table, the numbers in NAME.json
    local name=$1
    shift
    once "$name.json" eval.py "$@" --dtype "$DTYPE" "${protocol[@]}" --save "$name.json"
    rows+=("$name.json")
}

sparsity_type() {  # sparsity_type N:M: of the rows that follow
    n_m=$1 folder=$OUT/${1/:/of}
}

of_seed() {  # what the names of runs end with
    [ "$SEED" = 0 ] || echo "-seed$SEED"
}

dense() {
    evaluated "$OUT/dense" --model "$MODEL"
}

prune() {  # prune METHOD [NAME FLAGS...]
    local method=$1 name=${2:-$1}
    once "$folder/$name" prune.py --model "$MODEL" --dtype "$DTYPE" --prune_method "$method" --sparsity_type "$n_m" \
        "${calibration[@]}" "${@:3}" --save_model "$folder/$name"
}

pruned() {  # pruned METHOD [NAME FLAGS...]
    local name=$folder/${2:-$1}
    prune "$@"
    evaluated "$name" --model "$name" --sparsity_type "$n_m"
}

initial_mask() {  # Wanda's, where all learning starts
    prune wanda
    once "$folder/initial_mask.safetensors" get_mask.py --model "$folder/wanda" --sparsity_type "$n_m" \
        --save "$folder/initial_mask.safetensors"
}

learn() {  # learn SCRIPT RUN FLAGS...: RUN/mask.safetensors, evaluated on the original weights; resumes a stopped run
    local script=$1 run=$2 mask=(--mask "$folder/initial_mask.safetensors")
    shift 2
    [[ " $* " != *" --init random "* ]] || mask=()
    ran "$run/mask.safetensors" "$run" "$script" --model "$MODEL" --sparsity_type "$n_m" --dataset "$TRAIN_TEXT" \
        "${mask[@]}" --seqlen "$SQLEN" "$@" --skip_checkpoint
    evaluated "$run" --model "$MODEL" --mask "$run/mask.safetensors"
}

learned() {  # learned ESTIMATOR DATASET_SIZE LR LOGITS [online]: with m0's losses cached, or of a second forward pass
    # in the environment: AS, for its name, and FURTHER flags of train.py
    local minibatches=(--dataset_size "$2" --batchsize "$(($2 < BATCHSIZE ? $2 : BATCHSIZE))")
    [ -z "${FURTHER:-}" ] || [ -n "${AS:-}" ] || stop "give AS=NAME, the name of runs with FURTHER"
    local source baseline=$folder/baseline-size$2.npz run=$1${AS:+-$AS}-size$2-lr$3-logits$4-steps$STEPS
    initial_mask
    if [ "${5:-cached}" = online ]; then
        run=$run-online source=(--baseline online)
    else
        source=(--baseline "$baseline")
        once "$baseline" inference_loss.py --model "$MODEL" --dtype "$DTYPE" --mask "$folder/initial_mask.safetensors" \
            --dataset "$TRAIN_TEXT" --sqlen "$SQLEN" "${minibatches[@]}" --save "$baseline"
    fi
    run=$run$(of_seed)
    learn train.py "$folder/$run" --dtype "$DTYPE" --estimator "$1" "${minibatches[@]}" --lr "$3" \
        --logits "$4" --epoch "$STEPS" --max_step "$STEPS" "${source[@]}" --seed "$SEED" ${FURTHER:-}
}

ours() {  # this project's own method, by backward passes, in the dtype that sparsify.py chooses
    initial_mask
    learn sparsify.py "$folder/sparsify-steps$STEPS$(of_seed)" --steps "$STEPS" --distill 1 --seed "$SEED"
}

table() {  # table NAME: of the rows so far, to NAME/table.md
    local compare=(eval.py --compare)
    [ "$RECORD" = 0 ] || compare=(reproduce/record.py) rows=("$OUT")
    echo "\$ python ${compare[*]} ${rows[*]}"
    [ "$DRY" = 0 ] || return 0
    local made
    made=$("$PYTHON" "${compare[@]}" "${rows[@]}")
    mkdir -p "$OUT/$1"
    echo "$made" | tee "$OUT/$1/table.md"
}
