#!/bin/sh
# Makes the runs of results.md, one after the other, probes them, and puts their logs into docs/runs/.
# Started again, it goes on where it was. On 2 cores, 24 epochs of SCOTT-3/16 are one to two hours.
# Probes have 20 crops an image wherever they run, as a CPU's have by default.
#
#     sh docs/reproduce.sh EPOCHS [NAME ...]    # from the folder of scott.py; all runs, or those named
set -eu
epochs=${1:?how many epochs? 24 and 48 are what results.md speaks of, 12 beside other methods}
shift
wanted=" $* "
data="--data flowers102 --root data --img-size 96"
validate=

is_wanted() {  # NAME
    [ "$wanted" = "  " ] || [ "${wanted#* "$1" }" != "$wanted" ]
}

keep_logs() {  # folder
    mkdir -p "docs/$1"
    for log in config.json metrics.csv probe.json; do
        if [ -f "$1/$log" ]; then cp "$1/$log" "docs/$1"; fi
    done
}

method() {  # PROGRAM, NAME and flags of the program
    program=$1
    name=$2
    shift 2
    if ! is_wanted "$name"; then return; fi
    run=runs/$name-$epochs
    if [ -f "$run/last.pt" ]; then
        python $program --resume "$run/last.pt"
    else
        python $program $data --batch-size 64 --dropout 0 --attention-dropout 0 --drop-path 0 \
            --which student --epochs "$epochs" --out "$run" "$@"
    fi
    if [ ! -f "$run/probe.json" ]; then
        python probe.py --ckpt "$run/last.pt" --views different --copies 20 $validate
    fi
    keep_logs "$run"
}

row() {  # NAME and flags of scott.py
    method scott.py "$@"
}

probed() {  # NAME and flags of probe.py
    name=$1
    shift
    if ! is_wanted "$name"; then return; fi
    if [ ! -f "runs/$name/probe.json" ]; then python probe.py $data --copies 20 --out "runs/$name" "$@"; fi
    keep_logs "runs/$name"
}

without_blocks() {  # NAME and flags of probe.py: of a SCOTT-3/16, tokenizer and positions alone
    name=$1
    shift
    if ! is_wanted "$name"; then return; fi
    if [ ! -f "runs/$name/probe.json" ]; then
        python -c 'import sys, probe, scott
scott.SIZES["3"] = 384, 0, 4  # width, depth, heads
sys.exit(probe.main(sys.argv[1:]))' $data --views different --copies 20 --out "runs/$name" "$@"
    fi
    keep_logs "runs/$name"
}

probed untrained --random-init scott-3/16
probed untrained-seed-1 --random-init scott-3/16 --seed 1
row default --model scott-3/16
row seed-1 --model scott-3/16 --seed 1
row hidden-blocks --model scott-3/16 --mask hidden-blocks
row random --model scott-3/16 --mask random
probed vit-untrained --random-init vit-3/16
row vit --model vit-3/16
row vit-seed-1 --model vit-3/16 --seed 1
row no-colours --model scott-3/16 --views none
row trainval --model scott-3/16 --split trainval --epochs $((epochs * 127 / 31))  # equal steps
for run in default seed-1 vit-seed-1; do  # fine-tuned by the recipe of scratch-100 below
    probed "finetuned-$run-$epochs" --mode finetune --ckpt "runs/$run-$epochs/last.pt" \
        --lr 5e-4 --dropout 0.2 --attention-dropout 0.1 --drop-path 0.1
done
probed "finetuned-vit-seed-1-$epochs-defaults" --mode finetune --ckpt "runs/vit-seed-1-$epochs/last.pt"
probed scratch --mode finetune --random-init scott-3/16  # 300 epochs with labels
probed scratch-100 --mode finetune --random-init scott-3/16 --epochs 100 --batch-size 64
probed vit-scratch-100 --mode finetune --random-init vit-3/16 --epochs 100 --batch-size 64

# Beside I-JEPA, CAPI and Bootleg: the same recipe, two seeds; MIM-JEPA's are above.
for model in vit scott; do
    for seed in 0 1; do
        for other in ijepa capi bootleg; do
            method "-m baselines.$other" "$model-$other-$seed" --model "$model-3/16" \
                --recipe controlled --seed "$seed"
        done
    done
done
method "-m baselines.capi" vit-capi-ema --model vit-3/16 --recipe controlled --ema-start 0.996

# What the tokenizer has learned, and what the blocks above it
without_blocks tokenizer-untrained --random-init scott-3/16
for run in default seed-1 scott-ijepa-0 scott-capi-0 scott-bootleg-0; do
    without_blocks "tokenizer-$run-$epochs" --ckpt "runs/$run-$epochs/last.pt"
done

# Which learning rate each method likes, told by val alone; 5e-4 is that of the runs above. The best
# of the three is then probed without --validate.
validate=--validate
for run in vit vit-ijepa-0 vit-capi-0 vit-bootleg-0; do
    if ! is_wanted "val-$run"; then continue; fi
    if ! grep -q '"validate": true' "runs/$run-$epochs/probe.json"; then
        python probe.py --ckpt "runs/$run-$epochs/last.pt" --views different --copies 20 $validate
    fi
    keep_logs "runs/$run-$epochs"
done
for lr in 1.5e-4 1.5e-3; do
    row "vit-lr-$lr" --model vit-3/16 --lr "$lr"
    for other in ijepa capi bootleg; do
        method "-m baselines.$other" "vit-$other-lr-$lr" --model vit-3/16 --recipe controlled --lr "$lr"
    done
done
