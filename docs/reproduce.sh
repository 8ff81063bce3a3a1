#!/bin/sh
# Makes the runs of results.md, one after the other, probes them, and puts their logs into docs/runs/.
# Started again, it goes on where it was. On 2 cores, 24 epochs of SCOTT-3/16 are about an hour.
#
#     sh docs/reproduce.sh EPOCHS [NAME ...]    # from the folder of scott.py; all runs, or those named
set -eu
epochs=${1:?how many epochs? 24 and 48 are what results.md speaks of}
shift
wanted=" $* "

row() {  # NAME and flags of scott.py
    name=$1
    shift
    if [ "$wanted" != "  " ] && [ "${wanted#* "$name" }" = "$wanted" ]; then return; fi
    run=runs/$name-$epochs
    if [ -f "$run/last.pt" ]; then
        python scott.py --resume "$run/last.pt"
    else
        python scott.py --data flowers102 --root data --img-size 96 --batch-size 64 --dropout 0 \
            --attention-dropout 0 --drop-path 0 --which student --epochs "$epochs" --out "$run" "$@"
    fi
    if [ ! -f "$run/probe.json" ]; then python probe.py --ckpt "$run/last.pt" --views different; fi
    mkdir -p "docs/$run"
    cp "$run/config.json" "$run/metrics.csv" "$run/probe.json" "docs/$run"
}

untrained() {  # NAME and model
    if [ "$wanted" != "  " ] && [ "${wanted#* "$1" }" = "$wanted" ]; then return; fi
    if [ ! -f "runs/$1/probe.json" ]; then
        python probe.py --random-init "$2" --data flowers102 --root data --img-size 96 --out "runs/$1"
    fi
    mkdir -p "docs/runs/$1"
    cp "runs/$1/probe.json" "docs/runs/$1"
}

untrained untrained scott-3/16
row default --model scott-3/16
row seed-1 --model scott-3/16 --seed 1
row hidden-blocks --model scott-3/16 --mask hidden-blocks
row random --model scott-3/16 --mask random
untrained vit-untrained vit-3/16
row vit --model vit-3/16
row no-colours --model scott-3/16 --views none
row trainval --model scott-3/16 --split trainval --epochs $((epochs * 127 / 31))  # equal steps
