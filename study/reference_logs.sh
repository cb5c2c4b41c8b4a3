#!/usr/bin/env bash
# Train the runs whose logs are the references of `eval.py compare`, on a CPU or one GPU, and copy
# log.jsonl and run.json to study/logs. Logs that are there are not made again, and an interrupted
# run continues. DATA contains class folders of CIFAR-10: 5000 images in train/.
#   DATA=path/to/cifar10-5k bash study/reference_logs.sh
# To try the commands with two steps each:
#   sed 's/--steps [0-9]*/--steps 2/' study/reference_logs.sh | LOGS=/tmp/logs RUNS=/tmp/runs DATA=... bash
set -eu
LOGS=${LOGS:-study/logs} RUNS=${RUNS:-runs/reference} PY=${PY:-.venv/bin/python}
CIFAR="--image 32 --patch 8 --steps 480 --perceptual none --save-every 100"
S="--size S --image 64 --patch 16 --batch 32 --batch-ssl 16 --batch-rec 32 --steps 200 --perceptual none --save-every 50"

is_there() {
    [ -f "$LOGS/$1/log.jsonl" ]
}
keep() {
    mkdir -p "$LOGS/$1"
    cp "$RUNS/$1/run.json" "$LOGS/$1/run.json"
    cp "$RUNS/$1/log.jsonl" "$LOGS/$1/log.jsonl.part"
    mv "$LOGS/$1/log.jsonl.part" "$LOGS/$1/log.jsonl"        # last: it marks a complete copy
}

NAME=nano-cifar10/seed0
is_there $NAME || $PY train.py --out $RUNS/$NAME --data "$DATA" $CIFAR --seed 0
is_there $NAME || keep $NAME
NAME=nano-cifar10/seed1
is_there $NAME || $PY train.py --out $RUNS/$NAME --data "$DATA" $CIFAR --seed 1
is_there $NAME || keep $NAME
NAME=nano-cifar10/seed2
is_there $NAME || $PY train.py --out $RUNS/$NAME --data "$DATA" $CIFAR --seed 2
is_there $NAME || keep $NAME
NAME=S-shapes/seed0
is_there $NAME || $PY train.py --out $RUNS/$NAME --data shapes $S --seed 0
is_there $NAME || keep $NAME
NAME=S-shapes/seed1
is_there $NAME || $PY train.py --out $RUNS/$NAME --data shapes $S --seed 1
is_there $NAME || keep $NAME
NAME=S-shapes/seed2
is_there $NAME || $PY train.py --out $RUNS/$NAME --data shapes $S --seed 2
is_there $NAME || keep $NAME
