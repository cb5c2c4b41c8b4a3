#!/usr/bin/env bash
# What the GAN of stage 2 does to reconstructions: 10 classes of ImageNet at 64 px, on a CPU.
# Three decoders of one tokenizer: that of stage 1; trained on with L1 alone, so that the effect of
# more steps is not taken for that of the GAN; trained on with the GAN.
#   DATA=path/to/imagenet64-10 bash study/stage2.sh
set -eu
RUN=${RUN:-runs/imagenet64-10} PY=${PY:-.venv/bin/python}
# the tokenizer of study/imagenet64-10.sh; if it is there already, nothing happens
$PY train.py --out $RUN --data "$DATA" --image 64 --patch 16 --batch 100 --batch-ssl 50 \
    --batch-rec 100 --steps 1500 --set teacher_temp=0.07 --perceptual none
$PY train.py --stage 2 --init $RUN --out $RUN-l1 --steps 400 --perceptual none --w-gan 0
$PY train.py --stage 2 --init $RUN --out $RUN-gan --steps 400 --perceptual none
for NAME in $RUN $RUN-l1 $RUN-gan; do
    test $NAME = $RUN || cp $RUN/judge.safetensors $NAME/          # one classifier for all three
    $PY eval.py recon $NAME --perceptual none --features classifier --few --set judge_steps=1200
done
$PY study/stage2.py $RUN-gan/decoders.png $RUN $RUN-l1 $RUN-gan
