#!/usr/bin/env bash
# Pretrains a small model on the embedded data set: with 2 processes on a CPU, or one on every GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
video-mae demo data/demo
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ $gpus -gt 0 ]]; then devices=(--num_gpus "$gpus"); else devices=(--num_accelerators 2); export DS_ACCELERATOR=cpu; fi
SECONDS=0
deepspeed "${devices[@]}" --module video_mae pretrain configs/pretrain/demo.yaml "$@"
echo "trained in $SECONDS s"
