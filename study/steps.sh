#!/usr/bin/env bash
# Two steps of the paper's S and L at its resolution, 256 px with patch 16: shapes, parameter
# counts, memory. Batch 2, on a CPU.
#   DATA=path/to/images (class folders) bash study/steps.sh
set -eu
OUT=${OUT:-runs/steps} PY=${PY:-.venv/bin/python}
$PY train.py --size S --out $OUT/S --fresh --data "$DATA" --batch 2 --batch-ssl 2 --batch-rec 2 \
    --steps 2 --log-every 1 --perceptual none
$PY train.py --size L --out $OUT/L --fresh --data "$DATA" --batch 2 --batch-ssl 2 --batch-rec 2 \
    --steps 2 --log-every 1 --perceptual none
