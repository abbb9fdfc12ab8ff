#!/usr/bin/env bash
# Pretrains a small model on the embedded data set with 2 processes on a CPU, or on every GPU; then probes it, fine-tunes it and tests it,
# with the same from random weights beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
SECONDS=0
video-mae demo data/demo
ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ $ranks -gt 0 ]]; then
    devices=(--num_gpus "$ranks")
else
    ranks=2
    devices=(--num_accelerators "$ranks")
    export DS_ACCELERATOR=cpu
fi
launch() { deepspeed "${devices[@]}" --module video_mae "$@"; }
share() { echo $(($1 > ranks ? $1 / ranks : 1)); } # of a global batch, whatever the number of processes
train() { launch "$1" "configs/$1/demo.yaml" "optim.micro_batch=$(share "$2")" "${@:3}"; }

train pretrain 16
echo "pretrained after $SECONDS s"
unseen=$(find data/demo/val/roll_clockwise -name '*.mp4' | sort | sed -n 3p)
video-mae reconstruct runs/demo/model "$unseen" runs/demo/unseen.png mask.ratio=0.75 stride=2

# The settings of a probe are chosen on videos of two photographs that it was not trained on; the test photographs are seen once.
awk '(NR - 1) / 8 % 8 < 6' data/demo/train.txt >data/demo/probe_train.txt
awk '(NR - 1) / 8 % 8 >= 6' data/demo/train.txt >data/demo/probe_validation.txt
for weights in pretrained random; do
    video-mae probe runs/demo/model train=data/demo/probe_train.txt validation=data/demo/probe_validation.txt test=data/demo/val.txt \
        data.stride=2 weights=$weights epochs=20 num_workers=1 output=runs/demo_probe_$weights
done
echo "probed after $SECONDS s"

train finetune 32
train finetune 32 checkpoint= output=runs/demo_scratch optim.layer_decay=1
for run in finetuned scratch; do
    launch evaluate runs/demo_$run data/demo/val.txt num_clips=2 num_crops=1 num_workers=1
done
python scripts/demo_figures.py
echo "done after $SECONDS s"
