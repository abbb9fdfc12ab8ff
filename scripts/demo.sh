#!/usr/bin/env bash
# Pretrains a small model on the embedded data set: with 2 processes on a CPU, or on every GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
videos_per_step=16 # as in the recipe, whatever the number of processes
video-mae demo data/demo
ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ $ranks -gt 0 ]]; then
    devices=(--num_gpus "$ranks")
else
    ranks=2
    devices=(--num_accelerators "$ranks")
    export DS_ACCELERATOR=cpu
fi
micro_batch=$((videos_per_step > ranks ? videos_per_step / ranks : 1))
SECONDS=0
deepspeed "${devices[@]}" --module video_mae pretrain configs/pretrain/demo.yaml "optim.micro_batch=$micro_batch"
echo "trained in $SECONDS s"
unseen=$(find data/demo/val/roll_clockwise -name '*.mp4' | sort | sed -n 3p)
video-mae reconstruct runs/demo/model "$unseen" runs/demo/unseen.png mask.ratio=0.75 stride=2
