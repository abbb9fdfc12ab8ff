"""Pretrains a small model on videos, without the command line and without DeepSpeed.

python examples/pretrain.py VIDEOS NEW_FOLDER [STEPS]
VIDEOS: a list, a folder, or one video. NEW_FOLDER: becomes a model folder, for `load_pretrained`.
"""

import sys

import torch

from video_mae import ModelConfig, VideoMAE, save_model_folder, tube_mask
from video_mae.config import DataConfig, OptimConfig
from video_mae.data import ClipDataset, StepSampler, make_loader, read_annotations
from video_mae.training.optim import make_optimizer


def main() -> None:
    """Trains on videos and writes a model folder."""
    source, folder = sys.argv[1:3]
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    # ModelConfig.preset("base") is ViT-B; a small one learns on a CPU, too
    config = ModelConfig(
        num_frames=8, height=48, width=48, patch_size=12, embed_dim=96, depth=4, num_heads=3
    )
    model = VideoMAE(config).to(device)
    optimizer = make_optimizer(model, OptimConfig(base_lr=1e-3), fused=True)

    data = DataConfig(source=source, stride=2, num_workers=2)
    videos = read_annotations(data)
    clips = ClipDataset(videos, data, config.num_frames, config.height, config.width, seed=0)
    # micro-batches of 8 videos for the steps 0 to steps - 1, of rank 0 of 1
    sampler = StepSampler(len(videos), 8, 1, 0, 1, 0, 0, steps)
    for step, batch in enumerate(make_loader(clips, sampler, data)):
        batch = batch.to(device)
        mask = tube_mask(batch.seeds_B, model.grid, ratio=0.75)
        output = model(batch.clip_BTHWC, mask)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}  loss {output.loss.item():.4f}", flush=True)
    save_model_folder(folder, model)
    print(f"model {folder}")


if __name__ == "__main__":
    main()
