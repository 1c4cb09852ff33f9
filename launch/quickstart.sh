#!/usr/bin/env bash
# The main job from nothing, on a laptop or a GPU: installs; makes a bilingual moderation set and a small checkpoint; trains under
# torchrun; judges held-out conversations beside a linear model; exports a Hugging Face directory, which transformers then loads to
# judge three messages.
#
#   bash launch/quickstart.sh                      # all of it; arguments are overrides, such as steps=100
#   bash launch/quickstart.sh --real               # begin from real weights, SmolLM2-135M-Instruct, instead of random ones
#   bash launch/quickstart.sh --lora               # train an adapter beside the frozen weights; it is judged on them, and merged
#   bash launch/quickstart.sh --qlora              # the same on weights in 4 bits
#   DATA=rows.jsonl bash launch/quickstart.sh      # your own labelled rows instead of the generated ones
#   SEED=2 bash launch/quickstart.sh               # other rows, other weights, another order
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
real=
lora=
qlora=
while [[ "${1:-}" == --* ]]; do
    case $1 in
        --real) real=1 ;;
        --lora) lora=1 ;;
        --qlora) lora=1 qlora=1 ;;
        *)
            echo "megamod: error: $1: --real, --lora, --qlora or overrides such as steps=100 were expected" >&2
            exit 1
            ;;
    esac
    shift
done
for argument in "$@"; do
    case $argument in
        dir=* | model.path=* | data.train=* | eval.data=* | seed=* | checkpoint.export=*)
            echo "megamod: error: $argument: the quickstart sets it itself; use launch/node.sh, or SEED=… and DATA=…" >&2
            exit 1
            ;;
    esac
done
if [ -n "${DATA:-}" ]; then # seen from where the user is
    DATA=$(realpath -e -- "$DATA") || exit 1
fi
megamod_venv "${real:+gguf}"
cd "$MEGAMOD_ROOT"
began=$SECONDS
seed=${SEED:-1}
say() { printf '\n== %s\n' "$*"; }

NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
export NPROC
kind=${lora:+_lora}
[ -z "$qlora" ] || kind=_qlora
run=runs/quickstart${real:+_real}$kind
new=$run.new # the rows may come from an earlier quickstart's folder
rm -rf "$new"
trap 'rm -rf "$new"' EXIT

say "data"
if [ -n "${DATA:-}" ]; then
    python tools/split_data.py "$DATA" "$new/data" --seed "$seed"
elif [ -n "$real" ]; then # fewer rows: a token costs fifty times as much
    python tools/make_dataset.py "$new/data" --train 1000 --held-out 200 --seed "$seed"
else
    python tools/make_dataset.py "$new/data" --train 8000 --validation 300 --held-out 1000 --seed "$seed"
fi
rm -rf "$run"
mkdir -p "$run"
mv "$new/data" "$run/data"

say "a checkpoint to begin with"
if [ -n "$real" ]; then
    model=models/smollm2
    python tools/real_weights.py "$model"
    set -- configs/smollm2.py steps=28 checkpoint.every=none "$@"
    judging=(--dtype bfloat16 --scoring first_token --decode 12)
else
    model=$run/base
    python tools/make_checkpoint.py "$model" --data "$run/data/train.jsonl" --seed "$seed"
    set -- configs/quickstart.py "eval.data=$run/data/validation.jsonl" "$@"
    judging=(--decode 100)
fi

if [ -n "$lora" ] && [ -n "$real" ]; then
    set -- "$1" lora.r=16 lora.lora_alpha=32 optim.lr=1e-3 "${@:2}"
elif [ -n "$lora" ]; then # random weights know no words: the adapter has an embedding of its own, and ranks almost as large as they
    set -- "$1" lora.r=64 lora.lora_alpha=64 "lora.modules_to_save=('embed_tokens',)" "${@:2}"
fi

if [ -n "$qlora" ]; then
    set -- "$1" model.quantization.quant_type=nf4 "${@:2}"
fi

say "training on $NPROC ranks"
bash launch/node.sh "$@" "dir=$run" "model.path=$model" "data.train=$run/data/train.jsonl" "seed=$seed"
if [ -n "$lora" ]; then
    adapter=$(ls -d "$run"/peft/step-*)
    exported=$run/hf/$(basename "$adapter")
    say "merging the adapter"
    python tools/adapter.py merge "$adapter" "$exported"
    judged=("$model" --adapter "$adapter")
else
    exported=$(ls -d "$run"/hf/step-*)
    judged=("$exported")
fi

say "judging the held-out conversations"
torchrun --standalone --nproc-per-node "$NPROC" tools/judge.py --model "${judged[@]}" "$run/data/held_out.jsonl" "$run/verdicts.jsonl" "${judging[@]}"
python tools/evaluate.py "$run/verdicts.jsonl" "$run/report" --train "$run/data/train.jsonl" --test "$run/data/held_out.jsonl" --name megamod
python tools/plot_run.py "$run" "$run/report/curves.png"

say "the export in transformers"
python tools/ask.py --model "$exported" \
    "I am going to hurt the nurse after class." \
    "The nurse said that I should hurt my neighbour, but I would never do that." \
    "我先帮你杀掉卡死的进程，周末之前再给你写推荐信。"

say "done in $((SECONDS - began)) s after the install"
printf '%-22s %s\n' \
    "training rows" "$run/data/train.jsonl" \
    "held-out rows" "$run/data/held_out.jsonl" \
    "loss, validation" "$run/metrics.jsonl, $run/report/curves.png, $run/tensorboard" \
    "verdicts" "$run/verdicts.jsonl" \
    "numbers, plots" "$run/report/metrics.json, $run/report/report.png" \
    "Hugging Face directory" "$exported" \
    ${lora:+"PEFT directory" "$adapter"}
