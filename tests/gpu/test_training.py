"""The whole training step on a CUDA device: one graph, no host sync, the curve of the reference,
and a run from decoded video.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_mae import ModelConfig, ObjectiveConfig, VideoMAE, token_mask, tube_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

JOINT = ObjectiveConfig(contrastive_weight=0.1)


def clips(config: ModelConfig, batch: int, seed: int) -> torch.Tensor:
    """Smooth moving patterns: noise has nothing to be learned."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 3, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(
        coarse, (config.num_frames, config.height, config.width), mode="trilinear"
    )
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cuda()


@pytest.mark.parametrize("decoder_mask_ratio", [0.0, 0.5])
def test_forward_and_backward_are_one_graph_without_a_host_sync(decoder_mask_ratio: float) -> None:
    torch.manual_seed(0)
    model = VideoMAE(ModelConfig.preset("small", decoder_depth=2, depth=4), JOINT).cuda().bfloat16()
    compiled = torch.compile(model, fullgraph=True)
    seeds = torch.arange(4, device="cuda")
    clip = clips(model.config, 4, 0)

    def step() -> torch.Tensor:
        mask = token_mask(seeds, model.grid, "tube", 0.9, decoder_mask_ratio)
        loss = compiled(clip, mask).loss
        loss.backward()
        return loss

    eager = model(clip, token_mask(seeds, model.grid, "tube", 0.9, decoder_mask_ratio)).loss.item()
    first = step().item()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again.item() == pytest.approx(first, rel=1e-3)
    assert first == pytest.approx(eager, rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_train_as_the_reference_does(dtype: torch.dtype) -> None:
    config = ModelConfig(
        num_frames=8,
        height=64,
        width=64,
        embed_dim=128,
        depth=4,
        num_heads=2,
        decoder_embed_dim=128,
        decoder_depth=2,
        decoder_num_heads=2,
    )
    curves = {}
    for impl in ("reference", "triton"):
        torch.manual_seed(0)
        model = VideoMAE(config, JOINT, impl=impl).cuda().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        losses = []
        for step in range(200):
            seeds = torch.arange(8, device="cuda") + 8 * step
            loss = model(clips(config, 8, step % 16), tube_mask(seeds, model.grid, 0.75)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves[impl] = torch.stack(losses).cpu()
    reference, kernels = curves["reference"], curves["triton"]
    assert reference[-20:].mean() < 0.8 * reference[:5].mean()
    torch.testing.assert_close(
        kernels[:10], reference[:10], rtol=5e-3 if dtype == torch.float32 else 3e-2, atol=0.0
    )
    torch.testing.assert_close(kernels[-20:].mean(), reference[-20:].mean(), rtol=5e-2, atol=0.0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_of_a_published_size_trains_from_decoded_video(
    stage: int, demo_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("decord")
    (tmp_path / "small.yaml").write_text("model: {preset: small}\n")
    run = tmp_path / "run"
    overrides = [
        f"output={run}",
        f"data.source={demo_folder / 'train.txt'}",
        "data.stride=1",
        "data.num_workers=4",
        "optim.micro_batch=8",
        "optim.steps=20",
        "optim.warmup_steps=5",
        "optim.base_lr=3e-3",
        f"engine.zero_stage={stage}",
        "engine.precision=bf16",
        "engine.activation_checkpointing=true",
        "objective.contrastive_weight=0.1",
        "mask.decoder_mask_ratio=0.5",
        "journal.log_interval=1",
    ]
    subprocess.run(
        [sys.executable, "-m", "video_mae", "pretrain", str(tmp_path / "small.yaml"), *overrides],
        check=True,
        timeout=500,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["skipped_steps"] == 0
    assert (run / "model" / "model.safetensors").is_file()
