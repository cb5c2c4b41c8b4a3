#!/usr/bin/env bash
# All stages on CIFAR-10, on a CPU. DATA contains class folders of 32 px images, train/ and val/;
# docs/data.md shows how to make them. What it gave with 5000 images is in docs/data.md.
#   DATA=path/to/cifar10 bash study/cifar10.sh
set -eu
RUN=${RUN:-runs/cifar10} PY=${PY:-.venv/bin/python}
$PY train.py --out $RUN --data "$DATA" --image 32 --patch 8 --batch 64 --batch-ssl 32 \
    --batch-rec 64 --steps 1500 --perceptual none
$PY eval.py zeroshot $RUN
$PY eval.py probe $RUN
$PY eval.py recon $RUN --perceptual none
$PY dit.py latents $RUN --fresh
$PY dit.py train $RUN/latents --out $RUN/dit --size nano --steps 2500 --batch 64 --lr 1e-3 \
    --warmup 50
$PY dit.py sample $RUN/dit --per-class 100 --points 50 --cfg 3 --set cfg_channels=all --fresh
$PY eval.py fid $RUN/dit/samples --run $RUN --features classifier --few --set judge_steps=1200
$PY eval.py report $RUN
