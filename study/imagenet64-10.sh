#!/usr/bin/env bash
# All stages on photographs, on a CPU. DATA contains class folders: 10 classes of ImageNet at 64 px,
# 5000 images in train/ and 500 in val/.
#   DATA=path/to/imagenet64-10 bash study/imagenet64-10.sh
set -eu
RUN=${RUN:-runs/imagenet64-10} PY=${PY:-.venv/bin/python}
$PY train.py --out $RUN --data "$DATA" --image 64 --patch 16 --batch 100 --batch-ssl 50 \
    --batch-rec 100 --steps 1500 --set teacher_temp=0.07 --perceptual none
$PY eval.py zeroshot $RUN
$PY eval.py probe $RUN
$PY eval.py recon $RUN --perceptual none
$PY dit.py latents $RUN --fresh
$PY dit.py train $RUN/latents --out $RUN/dit --size nano --steps 2500 --batch 64 --lr 1e-3 \
    --warmup 50
$PY dit.py sample $RUN/dit --per-class 50 --points 50 --cfg 3 --set cfg_channels=all --fresh
$PY eval.py fid $RUN/dit/samples --run $RUN --features classifier --few --set judge_steps=1200
$PY eval.py report $RUN
