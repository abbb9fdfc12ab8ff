#!/usr/bin/env bash
# Pretrains a small model on the embedded data set with 2 processes on a CPU, or on every GPU, with its features probed while it trains;
# then fine-tunes it and tests it, with the same from random weights beside it.
# More keys, of all that is rendered and of all trainings: DEMO_DATA="train_clips=480" DEMO_TRAINING="optim.steps=700" make demo
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
SECONDS=0
subject=people
unseen_action=cartwheel
changes=()
if ! python -c 'import pybullet' 2>/dev/null >/dev/null; then
    subject=cutouts
    unseen_action=roll_clockwise
    changes=(classifier.num_classes=8 data.flip=false) # left and right are labels of the cut-outs
    echo "pybullet is not installed here (pip has it for Python 3.11): moving cut-outs in place of people in action"
fi
read -ra more_data <<<"${DEMO_DATA-}"
read -ra more_training <<<"${DEMO_TRAINING-}"
video-mae demo data/demo subject=$subject height=48 width=48 "${more_data[@]}"
echo "$subject rendered after $SECONDS s"
ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ $ranks -gt 0 ]]; then
    devices=(--num_gpus "$ranks")
else
    ranks=2
    devices=(--num_accelerators "$ranks")
    export DS_ACCELERATOR=cpu
fi
launch() { deepspeed --log_level warning "${devices[@]}" --module video_mae "$@"; }
share() { echo $(($1 > ranks ? $1 / ranks : 1)); } # of a global batch, whatever the number of processes
train() { launch "$1" "configs/$1/demo.yaml" "optim.micro_batch=$(share "$2")" "${@:3}" "${more_training[@]}"; }

train pretrain 16
unseen=$(find "data/demo/val/$unseen_action" -name '*.mp4' | sort | sed -n 3p)
video-mae reconstruct runs/demo "$unseen" output=runs/demo/unseen
echo "pretrained after $SECONDS s"

train finetune 32 "${changes[@]}"
train finetune 32 checkpoint= output=runs/demo_scratch "${changes[@]}"
for run in finetuned scratch; do
    launch evaluate runs/demo_$run data/demo/val.txt num_clips=2 num_crops=1 num_workers=1
done
python scripts/demo_figures.py
echo "done after $SECONDS s"
