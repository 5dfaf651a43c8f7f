#!/usr/bin/env bash
# All measurements that need a CUDA device, in one command of less than 9 minutes: tests, decoders, peers, training.
#
#   bash benchmarks/gpu.sh [FOLDER]           # JSON goes to FOLDER, by default benchmarks/results/gpu
#   quick=1 bash benchmarks/gpu.sh FOLDER     # the same steps in small, on any machine: does the script itself work?
#
# Each part runs under a time limit and none stops the others; the exit status is 0 where all of them succeeded.
#
# What the time goes to, on a device of 4.8 TB/s (H200), 1,024 prompt and 128 new tokens, bfloat16. A 7B AR step reads
# 15 GB, 4 to 5 ms; 127 of them make 0.6 s. At 3 tokens a pass 128 tokens are 51 passes of 5 ms at batch 1, 0.3 s, and
# of 45 ms at batch 64, where the arithmetic of 2,048 tokens decides, 2.4 s; a prefill of 64 prompts takes 1.5 s. AR,
# block and dual at batch 1, 4, 16 and 64 are 15 s a round; 3 rounds, the warm-up and the run for the memory: 75 s, with
# start and recording of passes 100 s. 1.5B and 0.5B: 45 and 35 s. Transformers takes some 25 ms a token at any batch
# size, 3 s a run; 4 batch sizes, 2 rounds and a warm-up, ours beside it: 85, 60 and 50 s. Tests 30 s, the shipped
# checkpoint 25 s. Together 430 s of the 530 that are allowed; what could make passes faster (60 s, at one batch size)
# and training (40 s) run where 75 s are left, or later by themselves.
set -uo pipefail
began=$SECONDS budget=530
mkdir -p "${1:-$(dirname "$0")/results/gpu}"
folder=$(cd "${1:-$(dirname "$0")/results/gpu}" && pwd)
cd "$(dirname "$0")/.." || exit 1
folder=$(realpath --relative-to=. "$folder") # the results hold their command, which names it
python=${PYTHON:-python}
export TQDM_DISABLE=1 # no progress bars in a log
report=() failed=0

shapes=(7b 1.5b 0.5b) sizes=(--batch-sizes 1,4,16,64 --prompt-tokens 1024 --new-tokens 128)
how=(--device cuda --dtype bfloat16) rounds=3 peer_rounds=2 shipped=(--batch-sizes 1,16,64)
layouts=(--shape 0.5b --device cuda --rows 4 --seq-len 2048) choices=(--shape 7b --batch-sizes 1)
if [ -n "${quick:-}" ]; then
  shapes=(tiny) sizes=(--batch-sizes 1,2 --prompt-tokens 64 --new-tokens 16)
  how=(--device cpu) rounds=1 peer_rounds=1 shipped=(--batch-sizes 2 --prompts 2)
  layouts=(--rows 2 --steps 1) choices=(--shape tiny --batch-sizes 1 --device cpu --seconds 0.1)
fi

part() { # name, most seconds, command: run it, and remember how it went
  local name=$1 limit=$2 left=$((budget - SECONDS + began)) start=$SECONDS status word
  shift 2
  if [ "$left" -lt 10 ]; then
    report+=("NOT RUN  $name: no time left")
    failed=1
    return
  fi
  printf '\n=== %s: %s\n' "$name" "$*"
  # an interrupted bench still reports the rounds that it has finished; in the foreground Ctrl-C reaches it too
  timeout --foreground -s INT -k 10 "$((limit < left ? limit : left))" "$@"
  status=$?
  case $status in
    0) word="ok      " ;;
    124 | 137) word="TOO LONG" ;;
    130) exit 130 ;; # Ctrl-C
    *) word="FAILED  " ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  report+=("$word $name: $((SECONDS - start)) s")
}

part tests 90 "$python" -m pytest -q tests -k cuda
for shape in "${shapes[@]}"; do
  part "bench-$shape" 150 "$python" cli.py bench --shape "$shape" "${how[@]}" "${sizes[@]}" --rounds "$rounds" \
    --tokens-per-pass 3 --json "$folder/bench-$shape.json"
done
part bench-shipped 60 "$python" cli.py bench "${shipped[@]}" --device "${how[1]}" --rounds "$rounds" \
  --json "$folder/bench-shipped.json"
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)'; then
  for shape in "${shapes[@]}"; do
    part "peers-$shape" 120 "$python" benchmarks/peers.py --shape "$shape" "${how[@]}" "${sizes[@]}" \
      --rounds "$peer_rounds" --json "$folder/peers-$shape.json"
  done
else
  report+=("skipped  peers: Transformers is not installed")
fi
part_with_time() { # the same where 75 s are left
  if [ $((budget - SECONDS + began)) -lt 75 ]; then
    report+=("skipped  $1: less than 75 s are left")
  else
    part "$@"
  fi
}

part_with_time choices 100 "$python" benchmarks/cuda_choices.py "${choices[@]}" --json "$folder/cuda_choices.json"
part_with_time training 120 "$python" benchmarks/training_layouts.py "${layouts[@]}" --json "$folder/training.json"

printf '\n=== %s s, results in %s\n' "$((SECONDS - began))" "$folder"
printf '%s\n' "${report[@]}"
exit "$failed"
