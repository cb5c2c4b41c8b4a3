#!/usr/bin/env bash
# Train the paper's baselines LDM, VA-VAE and RAE on 10 classes of ImageNet at 64 px: 400 steps
# each, on a CPU, with the L1 loss only. The frozen encoder of VA-VAE and RAE is the run of
# study/imagenet64-10.sh.
#   DATA=path/to/imagenet64-10 bash study/baselines.sh
set -eu
ENCODER=${ENCODER:-runs/imagenet64-10} RUNS=${RUNS:-runs/baselines} PY=${PY:-.venv/bin/python}
COMMON="--image 64 --batch 32 --steps 400 --w-gan 0 --perceptual none --lr 5e-4"
$PY train.py --baseline ldm --patch 16 --out $RUNS/ldm --data "$DATA" $COMMON
$PY train.py --baseline vavae --encoder $ENCODER --patch 16 --out $RUNS/vavae --data "$DATA" $COMMON
$PY train.py --baseline rae --encoder $ENCODER --out $RUNS/rae --data "$DATA" $COMMON
for RUN in $RUNS/ldm $RUNS/vavae $RUNS/rae; do
    $PY eval.py recon $RUN --perceptual none
    $PY eval.py probe $RUN
done
$PY eval.py cost $RUNS/ldm
