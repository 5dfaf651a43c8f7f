#!/usr/bin/env bash
# Remake the shipped checkpoint from nothing: tokenizer, problems, autoregressive training, adaptation.
#     bash tiny/make.sh [FOLDER] [DEVICE]      cpu (default): about 110 minutes on one core; cuda: minutes
# Started again, it goes on where it stopped. Figures of the run that made the checkpoint stand in tiny/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/tiny}
device=${2:-cpu}
export OMP_NUM_THREADS=1
mkdir -p "$build/new" tiny/checkpoint

python tiny/tokenizer.py "$build/new"
cp tiny/config.json "$build/new/config.json"
make_problems() { # FILE and the generator's options
  [ -f "$1" ] && return
  python tiny/problems.py "${@:2}" --conversations 0.25 > "$1.part"
  mv "$1.part" "$1"
}
make_problems "$build/train.jsonl" --split train --seed 0 --count 400000
make_problems "$build/heldout.jsonl" --split heldout --seed 5 --count 600

common=(--data "$build/train.jsonl" --heldout "$build/heldout.jsonl" --seq-len 192 --batch-size 18 --micro-batch 18
  --schedule cosine --lr 2e-3 --seed 0 --threads 1 --device "$device")
python train.py ar --model "$build/new" --from-scratch --out "$build/ar" --steps 10000 --warmup 200 "${common[@]}"
python train.py adapt --model "$build/ar" --out "$build/adapted" --steps 2000 --warmup 100 --ar-weight 0.5 "${common[@]}"
python train.py adapt --model "$build/adapted" --out "$build/again" --steps 1200 --warmup 50 --ar-weight 0.5 \
  "${common[@]}" --lr 1e-3 --seed 1
for file in config.json model.safetensors tokenizer.json tokenizer_config.json; do
  cp "$build/again/$file" tiny/checkpoint/
done
