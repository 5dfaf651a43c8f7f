#!/usr/bin/env bash
# All measurements that need a CUDA device, in nine minutes. Each part leaves its figures; at the end they are joined.
#
#   bash benchmarks/gpu.sh [FOLDER]           # JSON goes to FOLDER, by default benchmarks/results/gpu
#   only="flex peers" bash benchmarks/gpu.sh FOLDER   # these parts alone, in a folder of their own
#   quick=1 bash benchmarks/gpu.sh FOLDER     # the same parts at toy size on a CPU: does the script work?
#
# Each part has a time limit and none stops the others; the exit status is 0 where all of them succeeded. The order is
# by what is learned per second, since a lent device may end early.
#
# Estimates of seconds, for one H100 of 3.35 TB/s; a 7B pass reads 15 GB, 5 to 7.5 ms:
#    30  tests      those of CUDA that compile nothing
#    75  bench      7B, batch 1 and 16; AR 127 passes of 7 ms = 0.9, the others 0.4 to 0.9: about 4 a round and
#                   batch size, 2 rounds, a recording and a run for the memory make 32; weights, recordings 35
#    70  training   0.5B shape, 4 rows of 2,048: as compiled and dense; start and compiling 25, 6 steps of 0.5;
#                   dense attention keeps about 106 GB, so on 80 GB its row is missing
#    90  runs       tiny model under torchrun, FSDP: three starts of 12, compiling, 24 steps of 0.3
#   140  flex       tests that compile FlexAttention
#   110  peers      1.5B, batch 1: Transformers takes 25 ms a token, 128 tokens 3.2; 3 batches of all ways, once to record, 50;
#                   weights and start 40
# Together 515 of 540: peers, the last, may be cut off, and has then written the batches that it did.
# benchmarks/real.sh, which takes longer, is the paper's recipe on a real model.
set -uo pipefail
began=$SECONDS budget=${budget:-540}
mkdir -p "${1:-$(dirname "$0")/results/gpu}"
folder=$(cd "${1:-$(dirname "$0")/results/gpu}" && pwd)
cd "$(dirname "$0")/.." || exit 1
folder=$(realpath --relative-to=. "$folder") # the results hold their command, which names it
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TQDM_MININTERVAL=10 # few lines of progress in a log
report=() failed=0

shape=7b middle=1.5b small=0.5b device=cuda rounds=2 steps=12
sizes=(--batch-sizes 1,16 --prompt-tokens 1024 --new-tokens 128) peers=(--prompt-tokens 512 --max-new-tokens 128)
step=(--seq-len 2048 --micro-batch 4)
if [ -n "${quick:-}" ]; then
  shape=tiny middle=tiny small=tiny device=cpu rounds=1 steps=3
  sizes=(--batch-sizes 1,2 --prompt-tokens 64 --new-tokens 16) peers=(--prompt-tokens 64 --max-new-tokens 16)
  step=(--seq-len 96 --micro-batch 2 --steps 1)
fi

part() { # name, most seconds, command: run it, and remember how it went
  local name=$1 limit=$2 left=$((budget - SECONDS + began)) start=$SECONDS status word
  shift 2
  [[ -z ${only:-} || " $only " == *" $name "* ]] || return
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

slow="flex or (cuda and (sparse or chosen or goes_on))" # these compile
part tests 60 "$python" -m pytest -q tests -k "(cuda or flex) and not ($slow)" -p no:cacheprovider
part bench 110 "$python" cli.py bench --shape "$shape" --device "$device" --dtype bfloat16 "${sizes[@]}" \
  --rounds "$rounds" --decoders ar,block,dual,verify,ahead --output "$folder/bench.json"
part training 90 "$python" benchmarks/training_step.py --shape "$small" --device "$device" "${step[@]}" \
  --output "$folder/training.json"
# sharded weights, once to the end and once from a checkpoint: the same losses
adapt=("$python" -m torch.distributed.run --standalone --nproc-per-node 1 train.py adapt --model tiny/checkpoint)
adapt+=(--data tiny/sample.jsonl --device "$device" --batch-size 8 --micro-batch 4 --seq-len 192 --lr 1e-4 --warmup 2)
part whole-run 80 "${adapt[@]}" --steps "$steps" --out "$work/whole"
part stopped-run 40 "${adapt[@]}" --steps $((steps / 3)) --out "$work/stopped"
part resumed-run 40 "${adapt[@]}" --steps "$steps" --out "$work/stopped"
part flex 200 "$python" -m pytest -q tests -k "$slow" -p no:cacheprovider
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)'; then
  rm -f "$folder/peers.jsonl"
  part peers 140 "$python" benchmarks/peers.py --shape "$middle" --device "$device" --dtype bfloat16 --exact \
    "${peers[@]}" --output "$folder/peers.jsonl"
else
  report+=("skipped  peers: Transformers is not installed")
fi

"$python" - "$folder" "$work" <<'JOIN'
import json, sys
from pathlib import Path

folder, work = map(Path, sys.argv[1:])
lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
runs = {name: lines(work / name / "metrics.jsonl") for name in ("whole", "stopped")}
losses = [[step["diffusion_loss"] for step in log] for log in runs.values()]
runs["largest_difference"] = max((abs(a - b) for a, b in zip(*losses)), default=None)
(folder / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "all"}
parts |= {"peers": lines(folder / "peers.jsonl")}
(folder / "all.json").write_text(json.dumps(parts, indent=1) + "\n")
print(f"\nlosses of the resumed run differ by at most {runs['largest_difference']}")
JOIN
printf '\n=== %s s, results in %s\n' "$((SECONDS - began))" "$folder"
printf '%s\n' "${report[@]}"
exit "$failed"
