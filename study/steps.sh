#!/usr/bin/env bash
# Run two steps of the paper's sizes S and L at 256 px with patch size 16, batch 2, on a CPU, to
# check shapes, parameter counts and memory.
#   DATA=path/to/images (class folders) bash study/steps.sh
set -eu
OUT=${OUT:-runs/steps} PY=${PY:-.venv/bin/python}
$PY train.py --size S --out $OUT/S --fresh --data "$DATA" --batch 2 --batch-ssl 2 --batch-rec 2 \
    --steps 2 --log-every 1 --perceptual none
$PY train.py --size L --out $OUT/L --fresh --data "$DATA" --batch 2 --batch-ssl 2 --batch-rec 2 \
    --steps 2 --log-every 1 --perceptual none
