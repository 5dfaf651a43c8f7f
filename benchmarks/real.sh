#!/usr/bin/env bash
# The paper's recipe on a real model: Qwen2.5-Coder-0.5B-Instruct, fully adapted on one CUDA device to its own
# answers and GSM8K's training set, then judged on GSM8K and HumanEval by every decoder. Only RESULTS matters
# afterwards; the weights stay in WORK. It needs no hand: interrupted or out of time, the same command goes on.
#
#   bash benchmarks/real.sh run MODEL DATA WORK RESULTS [SECONDS]   # ends by itself after SECONDS, else 540
#   bash benchmarks/real.sh cut MODEL PIECES     # the weights in pieces of 38 MB, for machines that take less
#   bash benchmarks/real.sh join PIECES MODEL    # than 64 MiB at once, with the other files; and back, checked
#   quick=1 bash benchmarks/real.sh run tiny/checkpoint DATA WORK RESULTS   # on a CPU: does the script work?
#
# DATA holds gsm8k_train.jsonl, gsm8k_test.jsonl, mbpp_train.jsonl and humaneval.jsonl as they are published.
# The exit status is 75 where time ran out. STEPS and MICRO set the adaptation's steps and micro-batch (a later
# call may raise STEPS), and COUNT the problems of GSM8K, where time or memory is short.
#
# Memory: backward keeps 68,160 bytes for each token in each layer; a row of 2,048 has 3 x 2,048 tokens (two views
# and the clean copy) in 24 layers, 10.1 GB. So --micro-batch 4 keeps 40 GB; weights, gradients and AdamW's state
# take 8 GB, a few chunks of logits 1 GB: a device of 80 GB has room. --micro-batch 8 needs 90 GB, such as an H200.
#
# Estimates of minutes on an H100; 0.5e9 parameters, 1.0 GB in bfloat16:
#    3  answers   3,000 answers of 250 tokens, 128 at a time, AR: 0.8 M tokens at 5,000 tokens/s
#   30  adapt     20 M tokens = 610 steps of 16 x 2,048; a token costs 6 x 0.5e9 x 3 views = 9 GFLOP, at 30% of
#                 400 Tflop/s 13,000 tokens/s: 26, and 15 checkpoints of 6 GB
#   12  judge     6 decoders x (1,319 + 164 answers of 250 tokens) = 2.2 M tokens at 3,000 to 8,000 tokens/s
# Together 45 minutes: five runs of ten. The paper's 1.5B saw 3,100 M tokens: this shows the way, not its result.
set -euo pipefail

absolute() { realpath -m -- "$1"; }
case ${1:-}:$# in
  cut:3)
    mkdir -p "$3"
    split -b 38M -d -a 3 "$2/model.safetensors" "$3/weights."
    (cd "$2" && sha256sum model.safetensors) >"$3/sha256"
    find "$2" -maxdepth 1 -type f ! -name '*.safetensors' -exec cp {} "$3" \;
    exit ;;
  join:3)
    mkdir -p "$3"
    cat "$2"/weights.* >"$3/model.safetensors"
    (cd "$3" && sha256sum --quiet -c -) <"$2/sha256"
    find "$2" -maxdepth 1 -type f ! -name 'weights.*' ! -name sha256 -exec cp {} "$3" \;
    exit ;;
  run:5 | run:6) ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$0" >&2
    exit 2 ;;
esac

model=$(absolute "$2") data=$(absolute "$3") work=$(absolute "$4") results=$(absolute "$5")
ends=$((SECONDS + ${6:-540}))
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=cuda longest=512 most=1500 batch=128
problems=("$data/gsm8k_test.jsonl" --paper-prompt ${COUNT:+--count "$COUNT"})
train=$data/gsm8k_train.jsonl
adapt=(--steps "${STEPS:-610}" --batch-size 16 --micro-batch "${MICRO:-4}" --seq-len 2048 --lr 3e-5 --warmup 50 --save-every 40)
if [ -n "${quick:-}" ]; then
  device=cpu longest=16 most=2 batch=2 problems=(tiny/sample.jsonl --count 2) train=tiny/sample.jsonl
  adapt=(--steps 2 --batch-size 2 --seq-len 192 --lr 1e-5 --warmup 1 --save-every 1)
fi
for name in gsm8k_train gsm8k_test mbpp_train humaneval; do # before anything runs
  [ -n "${quick:-}" ] || [ -s "$data/$name.jsonl" ] || { echo "$data/$name.jsonl is missing." >&2; exit 2; }
done
mkdir -p "$work" "$results"
trap 'cp -f "$work/adapted/metrics.jsonl" "$results" 2>/dev/null || :' EXIT
export TQDM_MININTERVAL=10

timed() { # a command, for the time that is left; where that is too short, the script ends and goes on next time
  local left=$((ends - SECONDS)) status=124
  if [ "$left" -ge 5 ]; then
    status=0
    timeout --foreground -s INT -k 20 "$left" "$@" || status=$?
  fi
  case $status in
    124 | 137)
      echo "Out of time; the same command goes on." >&2
      exit 75 ;;
    *) return "$status" ;;
  esac
}

# 1. Its own answers. Every file is there whole or not at all; what began goes on.
if [ ! -e "$work/prompts.jsonl" ]; then
  "$python" adapters/prompts.py --most "$most" --maths "$data/gsm8k_train.jsonl" --tasks "$data/mbpp_train.jsonl" \
    >"$work/prompts.part"
  mv "$work/prompts.part" "$work/prompts.jsonl"
fi
if [ ! -e "$work/own.jsonl" ]; then
  timed "$python" cli.py generate --model "$model" --device "$device" --block-size 1 --max-new-tokens "$longest" \
    --batch-size "$batch" --input "$work/prompts.jsonl" --output "$work/own.jsonl"
fi

# 2. Adaptation, which takes up its last checkpoint
if [ ! -e "$work/data.jsonl" ]; then
  cat "$work/own.jsonl" "$train" >"$work/data.part"
  mv "$work/data.part" "$work/data.jsonl"
fi
if [ ! -e "$work/adapted/model.safetensors" ]; then
  timed "$python" train.py adapt --model "$model" --data "$work/data.jsonl" --out "$work/adapted" --device "$device" \
    --block-size 32 --save-dtype bfloat16 "${adapt[@]}"
fi

# 3. Judged
if [ -n "${quick:-}" ]; then
  sed -n '1,2s/"id": [0-9]*/"task_id": "x"/p' tiny/prompts.jsonl >"$work/humaneval.jsonl"
else
  "$python" benchmarks/code_samples.py problems "$data/humaneval.jsonl" >"$work/humaneval.jsonl"
fi
judge() { # name, checkpoint, options
  local name=$1 from=$2
  shift 2
  if [ ! -e "$results/gsm8k_$name.json" ]; then
    timed "$python" cli.py eval "${problems[@]}" --model "$from" --device "$device" --batch-size 32 \
      --max-new-tokens "$longest" --output "$work/gsm8k_$name.jsonl" --json "$@" >"$work/gsm8k_$name.json"
    mv "$work/gsm8k_$name.json" "$results"
  fi
  if [ ! -e "$results/humaneval_$name.jsonl" ]; then # EvalPlus or human-eval run these, in their own sandbox
    timed "$python" cli.py generate --model "$from" --device "$device" --input "$work/humaneval.jsonl" \
      --batch-size 32 --max-new-tokens "$longest" --output "$results/humaneval_$name.answers.jsonl" "$@"
    "$python" benchmarks/code_samples.py samples "$results/humaneval_$name.answers.jsonl" >"$work/samples.jsonl"
    mv "$work/samples.jsonl" "$results/humaneval_$name.jsonl"
  fi
}
judge base "$model" --block-size 1
judge ar "$work/adapted" --block-size 1
judge threshold_1 "$work/adapted" --threshold 1
judge threshold_0.9 "$work/adapted" --threshold 0.9
judge dual "$work/adapted" --threshold 0.9 --cache dual
judge verify "$work/adapted" --verify
echo "Done; results are in $results."
