"""That the objective can be learned at all: one fixed batch, until it is known by heart."""

import math
from pathlib import Path

import pytest
import torch

from video_mae import ModelConfig, ObjectiveConfig, VideoMAE, tube_mask
from video_mae.config import DataConfig
from video_mae.data import Batch, ClipDataset, collate, read_annotations

FRAMES, SIDE = 8, 64
REAL = (
    "R6llTwEh07w.mp4",
    "v_SoccerJuggling_g23_c01.avi",
    "demo_demo.mp4",
    "flipping_a_pancake.mkv",
)


def batch_of(videos: list[Path], folder: Path) -> Batch:
    (folder / "videos.txt").write_text("".join(f"{video}\n" for video in videos))
    data = DataConfig(source=str(folder / "videos.txt"), stride=2)
    dataset = ClipDataset(read_annotations(data), data, FRAMES, SIDE, SIDE, seed=0)
    return collate([dataset[0, index] for index in range(len(videos))])


@pytest.mark.usefixtures("quiet_process")
@pytest.mark.parametrize("source", ["real", "rendered"])
def test_one_batch_is_learned_by_heart(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if source == "real":
        folder = request.getfixturevalue("shared_videos") / "real"
        videos = [folder / name for name in REAL]
    else:
        folder = request.getfixturevalue("demo_folder")
        videos = [
            folder / line.rsplit(" ", 1)[0]
            for line in (folder / "train.txt").read_text().splitlines()[::6]
        ]
    batch = batch_of(videos, tmp_path)
    torch.manual_seed(0)
    model = VideoMAE(
        ModelConfig(
            num_frames=FRAMES,
            height=SIDE,
            width=SIDE,
            embed_dim=192,
            depth=4,
            num_heads=3,
            decoder_embed_dim=192,
            decoder_depth=2,
            decoder_num_heads=3,
        ),
        ObjectiveConfig(contrastive_weight=0.1),
    )
    mask = tube_mask(batch.seeds_B, model.grid, 0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    outputs = []
    for step in range(201):
        output = model(batch.clip_BTHWC, mask)
        outputs.append((output.reconstruction_loss.item(), output.contrastive_loss.item()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        optimizer.step()
    know_nothing = math.log(mask.masked_BM.shape[1])
    (reconstruction, contrastive), (reconstruction_after, contrastive_after) = (
        outputs[0],
        outputs[-1],
    )
    assert 0.8 < reconstruction < 1.4
    assert contrastive == pytest.approx(know_nothing, rel=0.1)
    assert reconstruction_after < 0.3
    assert contrastive_after < know_nothing / 2
