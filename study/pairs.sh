#!/usr/bin/env bash
# Train on image-caption pairs in tar shards (2000 pairs of 64 px), and evaluate on labelled images
# (a folder of class folders), on a CPU.
#   DATA=path/to VAL=path/to/imagenet64-10 bash study/pairs.sh
set -eu
RUN=${RUN:-runs/pairs} PY=${PY:-.venv/bin/python}
$PY train.py --out $RUN --data "$DATA/pairs-{000000..000003}.tar" --val-data "$VAL" --image 64 \
    --patch 16 --batch 100 --batch-ssl 50 --batch-rec 100 --steps 300 --perceptual none
$PY eval.py zeroshot $RUN
$PY eval.py recon $RUN --perceptual none
