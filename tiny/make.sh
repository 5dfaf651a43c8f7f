#!/usr/bin/env bash
# Remake the shipped checkpoint from nothing: tokenizer, problems, autoregressive training, adaptation.
#     bash tiny/make.sh [FOLDER] [DEVICE]      cpu (default): about 4 hours on one core; cuda: minutes
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

common=(--data "$build/train.jsonl" --seq-len 192 --schedule cosine --compute bfloat16 --threads 1 --device "$device")
python train.py ar --model "$build/new" --from-scratch --out "$build/ar" --steps 10000 --batch-size 18 --micro-batch 18 \
  --lr 2e-3 --warmup 200 --seed 0 "${common[@]}"
adapt() { # what it starts from, its name, rows a step, rows at once, steps, learning rate, warm-up, seed
  python train.py adapt --model "$build/$1" --out "$build/$2" --batch-size "$3" --micro-batch "$4" --steps "$5" --lr "$6" \
    --warmup "$7" --seed "$8" --ar-weight 0.5 --heldout "$build/heldout.jsonl" "${common[@]}"
}
adapt ar first 18 18 2000 2e-3 100 0
adapt first second 18 18 1200 1e-3 50 1
adapt second third 6 6 4000 1.5e-3 100 2
adapt third fourth 36 18 800 1e-3 40 3
adapt fourth fifth 36 18 1700 1.5e-3 50 4
for file in config.json model.safetensors tokenizer.json tokenizer_config.json; do
  cp "$build/fifth/$file" tiny/checkpoint/
done
