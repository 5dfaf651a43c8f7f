#!/usr/bin/env bash
# All measurements that need a CUDA device, in eight minutes. Each part leaves its JSON; at the end they are joined.
#
#   bash benchmarks/gpu.sh [FOLDER]           # JSON goes to FOLDER, by default benchmarks/results/gpu
#   quick=1 bash benchmarks/gpu.sh FOLDER     # the same parts at toy size on a CPU: does the script work?
#
# Each part has a time limit and none stops the others; the exit status is 0 where all of them succeeded. The order is
# by what is learned per second, since a lent device may end early.
#
# Estimates of seconds, for one H100 of 3.35 TB/s; a 7B pass reads 15 GB, 5 to 7.5 ms:
#    20  profile    7B weights 10, two recordings 5, start 5
#    30  tests      those of CUDA, without the slow ones
#    90  choices    7B, 10 ways x 3 windows x 0.5 s = 15, compiling 2 x 30, weights 10
#    75  bench      7B, batch 1 and 16; AR 127 passes of 7 ms = 0.9, the others 0.4 to 0.9: about 4 a round and
#                   batch size, 2 rounds, a warm-up and a run for the memory make 32; weights, recordings 35
#    60  training   1.5B shape, four layouts, a process each: start 8, steps 7
#    40  resume     tiny model under torchrun, FSDP: three starts of 10, 24 steps of 0.3
#    60  flex       tests that compile FlexAttention
#   100  peers      1.5B, batch 1: Transformers takes 25 ms a token, 128 tokens 3.2, 3 rounds with first tokens
#                   12; ours 10; weights and start 20
# Together 475 of 480: peers, the last, may be cut off, and has then written the rounds that it did.
# benchmarks/real.sh, which takes longer, is the paper's recipe on a real model.
set -uo pipefail
began=$SECONDS budget=480
mkdir -p "${1:-$(dirname "$0")/results/gpu}"
folder=$(cd "${1:-$(dirname "$0")/results/gpu}" && pwd)
cd "$(dirname "$0")/.." || exit 1
folder=$(realpath --relative-to=. "$folder") # the results hold their command, which names it
python=${PYTHON:-python3}
export TQDM_DISABLE=1 # no progress bars in a log
report=() failed=0

shape=7b middle=1.5b device=cuda rounds=2 seconds=0.5 choices=(--batch-sizes 1)
sizes=(--batch-sizes 1,16 --prompt-tokens 1024 --new-tokens 128) peers=(--batch-sizes 1 --prompt-tokens 512)
layouts=(--shape 1.5b --device cuda --rows 1 --seq-len 2048) resumed=(--steps 12)
if [ -n "${quick:-}" ]; then
  shape=tiny middle=tiny device=cpu rounds=1 seconds=0.02
  sizes=(--batch-sizes 1,2 --prompt-tokens 64 --new-tokens 16)
  peers=(--batch-sizes 1 --prompt-tokens 64 --new-tokens 16) layouts=(--rows 2 --steps 1 --device cpu)
  resumed=(--steps 3 --seq-len 96)
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
  # an interrupted part has written what it measured until then; in the foreground Ctrl-C reaches it too
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

part profile 40 "$python" benchmarks/choices.py profile --shape "$shape" --device "$device" --json "$folder/profile.json"
part tests 60 "$python" -m pytest -q tests -k "cuda and not flex" -p no:cacheprovider
part choices 120 "$python" benchmarks/choices.py cuda --shape "$shape" --device "$device" "${choices[@]}" \
  --seconds "$seconds" --json "$folder/choices.json"
part bench 110 "$python" cli.py bench --shape "$shape" --device "$device" --dtype bfloat16 "${sizes[@]}" \
  --rounds "$rounds" --decoders ar,block,dual,verify,ahead --tokens-per-pass 3 --json "$folder/bench.json"
part training 90 "$python" benchmarks/training.py layouts "${layouts[@]}" --json "$folder/training.json"
part resume 60 "$python" benchmarks/training.py resume --device "$device" "${resumed[@]}" \
  --json "$folder/resume.json"
part flex 80 "$python" -m pytest -q tests/test_training.py -k "flex or sparse" -p no:cacheprovider
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)'; then
  part peers 140 "$python" benchmarks/peers.py --shape "$middle" --device "$device" --dtype bfloat16 \
    "${peers[@]}" --rounds "$rounds" --json "$folder/peers.json"
else
  report+=("skipped  peers: Transformers is not installed")
fi

"$python" - "$folder" <<'JOIN'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "all"}
(folder / "all.json").write_text(json.dumps(parts, indent=1) + "\n")
JOIN
printf '\n=== %s s, results in %s\n' "$((SECONDS - began))" "$folder"
printf '%s\n' "${report[@]}"
exit "$failed"
