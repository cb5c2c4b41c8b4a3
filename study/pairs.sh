#!/usr/bin/env bash
# Image-caption shards for training, labelled images for evaluation: 2000 pairs of 64 px, validation
# on a folder of class folders.
#   DATA=path/to VAL=path/to/imagenet64-10 bash study/pairs.sh
set -eu
RUN=${RUN:-runs/pairs} PY=${PY:-.venv/bin/python}
$PY train.py --out $RUN --data "$DATA/pairs-{000000..000003}.tar" --val-data "$VAL" --image 64 \
    --patch 16 --batch 100 --batch-ssl 50 --batch-rec 100 --steps 300 --perceptual none
$PY eval.py zeroshot $RUN
$PY eval.py recon $RUN --perceptual none
