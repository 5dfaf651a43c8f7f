#!/usr/bin/env bash
# Remake the shipped checkpoint from nothing: tokenizer, problems, autoregressive training, adaptation.
#     bash tiny/make.sh [FOLDER]          about 80 minutes on one core; started again, it goes on where it stopped
# Figures of the run that made the checkpoint stand in tiny/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/tiny}
export OMP_NUM_THREADS=1
mkdir -p "$build/new" tiny/checkpoint

python tiny/tokenizer.py "$build/new"
cp tiny/config.json "$build/new/config.json"
if [ ! -f "$build/train.jsonl" ]; then
  python tiny/problems.py --split train --seed 0 --count 300000 > "$build/train.part"
  mv "$build/train.part" "$build/train.jsonl"
fi

common=(--data "$build/train.jsonl" --batch-size 32 --schedule cosine --seed 0 --threads 1)
python train.py ar --model "$build/new" --from-scratch --out "$build/ar" --steps 6000 --lr 2e-3 --warmup 200 "${common[@]}"
python train.py adapt --model "$build/ar" --out "$build/adapted" --steps 4000 --lr 2e-3 --warmup 100 --ar-weight 0.5 "${common[@]}"
for file in config.json model.safetensors tokenizer.json tokenizer_config.json; do
  cp "$build/adapted/$file" tiny/checkpoint/
done
