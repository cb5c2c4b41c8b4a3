#!/usr/bin/env bash
# How much does a tokenizer lose with a fifth of the images? The first seed of nano-cifar10 in
# study/reference_logs.sh, once on FIVE (5000 images of CIFAR-10 in train/, 1000 in val/), and once on
# ONE (100 of the 500 images of each class in train/, the same val/). Both are measured on FIVE.
# Its commands were run one by one, not as this script; the numbers are in study/cifar10/few.jsonl.
#   FIVE=path/to/cifar10-5k ONE=path/to/cifar10-1k bash study/cifar10_few.sh
set -eu
RUNS=${RUNS:-runs/few} PY=${PY:-.venv/bin/python}
CIFAR="--image 32 --patch 8 --steps 480 --perceptual none --save-every 100 --seed 0"
$PY train.py --out $RUNS/five --data "$FIVE" $CIFAR
$PY train.py --out $RUNS/one --data "$ONE" $CIFAR
for RUN in $RUNS/five $RUNS/one; do
    $PY eval.py recon $RUN --perceptual none --data "$FIVE"
    $PY eval.py zeroshot $RUN --data "$FIVE"
    $PY eval.py probe $RUN --train-limit 5000 --data "$FIVE"
done
