#!/usr/bin/env bash
# Peak memory of one step of nano (built-in shapes, 48 px, bf16) against the batch and against --micro, --recompute.
#   bash study/micro.sh > study/micro.txt
set -eu
OUT=${OUT:-runs/micro} PY=${PY:-.venv/bin/python}
for batch in 64 512 4096; do
  for how in "" "--micro 64" "--micro 64 --recompute"; do
    peak=$($PY train.py --out $OUT --fresh --steps 1 --batch $batch --batch-ssl $((batch / 4)) --batch-rec $((batch / 8)) --perceptual none --precision bf16 $how 2>/dev/null \
           | sed -n 's/.*Peak memory \([0-9.]*\) GB.*/\1/p')
    printf 'batch %4d / %4d / %3d   %-24s %s GB\n' $batch $((batch / 4)) $((batch / 8)) "${how:-all at once}" "$peak"
  done
done
