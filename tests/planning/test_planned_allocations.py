"""The memory and the traffic of a plan, against what two ranks under the launcher allocate and what
DeepSpeed's log of communication counts.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from video_mae.config import load_config
from video_mae.config.machines import FACTS
from video_mae.model.vit import VideoMAE
from video_mae.planning.rehearsal import Rehearsal
from video_mae.planning.zero import zero_costs
from video_mae.training.deepspeed_config import zero_settings

ALLOCATIONS = Path(__file__).parent / "launched" / "allocations.py"
RUN = {
    "model": {
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "patch_size": 8,
        "embed_dim": 256,  # some matrices have more than 100,000 numbers, some have less
        "depth": 3,
        "num_heads": 4,
        "decoder_embed_dim": 128,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "mask": {"ratio": 0.75},
    "optim": {"micro_batch": 4, "steps": 4, "warmup_steps": 1},
    "engine": {"precision": "bf16"},
}
RANKS, ACCUMULATION = 2, 2

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def test_memory_and_traffic_are_those_of_two_ranks(tmp_path: Path):
    file, written = tmp_path / "run.yaml", tmp_path / "found.json"
    file.write_text(yaml.safe_dump({**RUN, "output": str(tmp_path / "run")}))
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--num_accelerators", str(RANKS), "--master_port", str(port)]
    subprocess.run(
        [launcher, *options, str(ALLOCATIONS), str(file), str(written)],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=500,
        capture_output=True,
    )
    found, config = json.loads(written.read_text()), load_config(file)
    base, slope = Rehearsal(config, "auto", False).costs()
    kept = 1e9 * (base + config.optim.micro_batch * slope)[0]
    weights = list(VideoMAE(config.model).parameters())
    small = sum(w.numel() for w in weights if w.numel() <= 100_000)
    large = sum(w.numel() for w in weights) - small
    for stage in range(4):
        measured = found[str(stage)]
        settings = FACTS.deepspeed | zero_settings(stage, small + large)
        memory, once, each = zero_costs(weights, 2, stage, RANKS, settings)
        of_weights, gradients, masters, buckets = 1e9 * memory
        all_reduced, gathered, scattered = 1e9 * (once + ACCUMULATION * each)
        in_backward = of_weights + gradients + masters + buckets
        between = of_weights + masters
        if stage < 3:
            assert measured["kept"] == pytest.approx(kept, rel=0.1)
            assert measured["backward ends"] == pytest.approx(in_backward, rel=0.1)
        else:  # what is gathered goes on the way; all else is there to stay
            assert measured["backward begins"] == pytest.approx(in_backward + kept, rel=0.1)
            between = in_backward - 2 * large
        assert measured["between steps"] == pytest.approx(between, rel=0.1)
        sent = measured["sent"]
        assert sent.get("all_reduce", 0) == pytest.approx(all_reduced, rel=0.01)
        # logged are the parts that are gathered, and the whole tensors that are scattered
        assert RANKS * sent.get("all_gather_into_tensor", 0) == pytest.approx(gathered, rel=0.01)
        assert sent.get("reduce_scatter_tensor", 0) == pytest.approx(scattered, rel=0.01)
    for stage in (0, 1, 3):
        settings = FACTS.deepspeed | zero_settings(stage, small + large)
        of_weights, gradients, masters, buckets = (
            1e9 * zero_costs(weights, 4, stage, RANKS, settings)[0]
        )
        between = of_weights + masters
        if stage == 3:
            between += gradients + buckets - 4 * large
        assert found[f"{stage} fp32"]["between steps"] == pytest.approx(between, rel=0.1)
    model = VideoMAE(config.model)
    for part in (model.encoder.patch_embed, *list(model.encoder.blocks)[:2]):
        part.requires_grad_(False)
    weights = list(model.parameters())
    num = sum(w.numel() for w in weights if w.requires_grad)
    settings = FACTS.deepspeed | zero_settings(3, num) | {"stage3_max_reuse_distance": 0}
    memory, once, each = zero_costs(weights, 2, 3, RANKS, settings)
    _, gathered, scattered = 1e9 * (once + ACCUMULATION * each)
    sent = found["3 frozen"]["sent"]
    assert RANKS * sent["all_gather_into_tensor"] == pytest.approx(gathered, rel=0.01)
    assert sent["reduce_scatter_tensor"] == pytest.approx(scattered, rel=0.01)
    on_the_host = 4 * sum(w.numel() for w in weights if not w.requires_grad)  # the engine's copy
    between = 1e9 * memory.sum() + on_the_host
    assert found["3 frozen"]["between steps"] == pytest.approx(between, rel=0.1)
