#!/usr/bin/env bash
# Measure the effect of the GAN of stage 2 on reconstructions: 10 classes of ImageNet at 64 px, on a
# CPU. Three decoders of the same tokenizer are compared: the decoder of stage 1, this decoder after
# further training with the L1 loss only, and after the same training with the GAN. The second one
# separates the effect of the additional steps from that of the GAN.
#   DATA=path/to/imagenet64-10 bash study/stage2.sh
set -eu
RUN=${RUN:-runs/imagenet64-10} PY=${PY:-.venv/bin/python}
# the tokenizer of study/imagenet64-10.sh; if that run is complete, this command does nothing
$PY train.py --out $RUN --data "$DATA" --image 64 --patch 16 --batch 100 --batch-ssl 50 \
    --batch-rec 100 --steps 1500 --set teacher_temp=0.07 --perceptual none
$PY train.py --stage 2 --init $RUN --out $RUN-l1 --steps 400 --perceptual none --w-gan 0
$PY train.py --stage 2 --init $RUN --out $RUN-gan --steps 400 --perceptual none
for NAME in $RUN $RUN-l1 $RUN-gan; do
    test $NAME = $RUN || cp $RUN/judge.safetensors $NAME/          # the same classifier for all
    $PY eval.py recon $NAME --perceptual none --features classifier --few --set judge_steps=1200
done
$PY study/stage2.py $RUN-gan/decoders.png $RUN $RUN-l1 $RUN-gan
