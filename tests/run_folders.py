"""Run folders as stages leave them, without a training: for tests of what reads them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from video_mae.config import FinetuneConfig, PretrainConfig
from video_mae.config.schema import parse, save_config
from video_mae.evaluation.scores import Scores, write_class_table
from video_mae.files import json_line
from video_mae.results import write_metrics
from video_mae.training.picture import PictureFrames, animate_reconstruction

START = 1_796_000_000.0
"""Seconds since 1970: when the first line was written."""
NAMES = (
    "pretending to put a very small thing onto a slanted surface but it slides down",
    "jump",
    "pushing something so that it almost falls off but doesn't",
    "opening a bottle <b>without</b> & with both hands",
    "cartwheel",
    "lifting up one end of something without letting it drop down",
    "tai chi",
    "spinning something so it continues spinning",
)


def class_names(num: int) -> list[str]:
    """As many names, most of them too long for the margin of a plot."""
    return [*NAMES, *(f"{NAMES[k % 8]}, the {k}th of its kind" for k in range(8, num))][:num]


def write_facts(folder: Path, total: int, finished: bool, **facts: Any) -> None:
    told = {
        "started": START,
        "step": 0,
        "total_steps": total,
        "videos": 960,
        "parameters": 22_500_000,
        "ranks": 2,
        "device": "2 x CPU",
        "versions": {"python": "3.11.7", "video-mae": "0.1.0", "torch": "2.14.1"},
        **facts,
    }
    if finished:
        told["finished"] = START + 3600
    (folder / "run.json").write_text(json.dumps(told))


def training_line(step: int, steps_an_epoch: int, **values: Any) -> dict[str, Any]:
    wave = math.sin(step)
    return {
        "step": step,
        "epoch": step / steps_an_epoch,
        "loss": 0.3 + 0.7 * math.exp(-step / 400) + 0.01 * wave,
        **values,
        "lr": 1e-3 * min(1, step / 200) * (1 + math.cos(math.pi * step / 1500)) / 2,
        "grad_norm": 0.5 + 0.1 * wave,
        "clips_per_second": 40 + wave,
        "data_wait": 0.03 + 0.01 * wave,
        "reading_ms": 2.0,
        "decoding_ms": 11.0 + wave,
        "augmenting_ms": 3.0,
        "collating_ms": 0.5,
        "copying_ms": 0.2,
        "mfu": None,
        "memory_gb": 1.25,
        "skipped_steps": 0,
        "bad_videos": 0,
        "time": START + 2.5 * step,
    }


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_bytes(b"".join(json_line(line) for line in lines))


def moving_frames(step: int, clips: int = 2, side: int = 48) -> PictureFrames:
    """A square on stripes, a tenth of it visible, predicted better after more steps."""
    t, h, w = torch.meshgrid(torch.arange(8), torch.arange(side), torch.arange(side), indexing="ij")
    ground = torch.stack([40 + h * 3, 60 + w * 2, 200 - h * 2], -1)
    is_square = ((h - 20).abs() < 8) & ((w - 8 - 3 * t).abs() < 8)
    original = torch.where(is_square[..., None], torch.tensor([230, 200, 40]), ground)
    original = torch.stack([original.roll(5 * clip, 1) for clip in range(clips)]).to(torch.uint8)
    is_seen = ((h // 8 + 3 * (w // 8)) % 10 == 0)[None, ..., None]
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(step))
    guess = (original.float() + noise * 4000 / (step + 40)).clamp(0, 255).to(torch.uint8)
    visible = torch.where(is_seen, original, 128).to(torch.uint8)
    return PictureFrames(original, visible, torch.where(is_seen, original, guess), "")


def pretraining(folder: Path, finished: bool = True, steps: int = 1400) -> Path:
    """A run that was probed, pictured, and met a bad video."""
    folder.mkdir(parents=True)
    config = parse(
        None,
        [
            f"output={folder}",
            "data.source=data/demo/train.txt",
            "probe.train=data/demo/train.txt",
            "probe.validation=data/demo/val.txt",
            "optim.steps=1400",
            "optim.micro_batch=16",
            "mask.ratio=0.75",
        ],
        PretrainConfig,
    )
    save_config(config, folder / "config.yaml")
    write_facts(folder, 1400, finished)
    lines: list[dict[str, Any]] = []
    for step in range(20, steps + 1, 20):
        lines.append(training_line(step, 60))
        if step % 280 == 0:
            probe = {
                "probe_loss": 0.35 + 0.7 * math.exp(-step / 400),
                "probe_rank": 4 + step / 200,
                "probe_dead": 0.1,
                "probe_knn": 0.1 + step / 8000,
                "probe_ridge": 0.12 + step / 7000,
            }
            lines.append({"step": step, "epoch": step / 60, **probe, "time": START + 2.5 * step})
            animation = folder / "reconstructions" / f"step_{step:08d}.webp"
            animate_reconstruction(animation, moving_frames(step))
    write_lines(folder, lines)
    bad = {"path": "/data/a <i>bad</i> video.mp4", "decoder": "pyav", "reason": "cut off"}
    (folder / "quarantine.jsonl").write_bytes(json_line({**bad, "step": 40, "time": START}))
    return folder


def fine_tuning(folder: Path, num_classes: int = 8) -> Path:
    folder.mkdir(parents=True)
    config = parse(
        None,
        [
            f"output={folder}",
            "checkpoint=runs/demo",
            "data.source=data/demo/train.txt",
            "validation.source=data/demo/val.txt",
            f"classifier.num_classes={num_classes}",
            f"classifier.class_names={json.dumps(class_names(num_classes))}",
            "classifier.stride=2",
            "optim.epochs=30",
        ],
        FinetuneConfig,
    )
    save_config(config, folder / "config.yaml")
    write_facts(folder, 900, finished=True)
    lines: list[dict[str, Any]] = []
    for step in range(30, 901, 30):
        lines.append(training_line(step, 30, accuracy=0.9 - 0.8 * math.exp(-step / 300)))
        top1 = 0.6 - 0.5 * math.exp(-step / 300) - (0.03 if step > 700 else 0)
        values = {"val_loss": 2 - top1, "val_top1": top1, "val_top5": 0.9, "val_videos": 240}
        lines.append({"step": step, "epoch": step / 30, **values, "time": START + 2.5 * step})
    write_lines(folder, lines)
    return folder


def evaluation(folder: Path, num_classes: int = 8, num_videos: int = 240, views: int = 10) -> Path:
    """The results of a test; in a folder of their own, or in that of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    random, names = np.random.default_rng(0), class_names(num_classes)
    # the last class has no videos
    label_M = np.arange(num_videos) % (num_classes - 1)
    logits_VMK = random.normal(size=(views, num_videos, num_classes)) * 0.7
    logits_VMK += random.normal(size=(num_videos, num_classes))
    logits_VMK[:, np.arange(num_videos), label_M] += 2.0 - 1.5 * (label_M % 3 == 0)
    score_VMK = np.exp(2 * logits_VMK)
    score_MK = (score_VMK / score_VMK.sum(axis=2, keepdims=True)).mean(axis=0)
    scores = Scores(score_MK, label_M)
    rows = b""
    for video in range(num_videos):
        first = np.argsort(-score_MK[video])[:5].tolist()
        row = {
            "path": f"/data/videos/{names[label_M[video]][:20]}/video number {video:05d}.mp4",
            "label": int(label_M[video]),
            "class": names[label_M[video]],
            "views": views,
            "view_predictions": logits_VMK[:, video].argmax(axis=1).tolist(),
            "predicted": first[0],
            "right": first[0] == label_M[video],
            "top": [{"class": names[k], "probability": float(score_MK[video, k])} for k in first],
        }
        row["right"] = bool(row["right"])
        rows += json_line(row)
    (folder / "predictions.jsonl").write_bytes(rows)
    write_class_table(folder / "classes.csv", scores, names)
    settings = {
        "model": str(folder / "best"),
        "list": "/data/val.txt",
        "sampling": "dense",
        "num_clips": views // 2,
        "num_crops": 2,
        "precision": "fp32",
        "bad_videos_are": "wrong",
    }
    more = {"interval": "Wilson, 95%", "views": views, "bad_videos": 0, "bad": []}
    made = {"device": "CPU", "versions": {"python": "3.11.7", "video-mae": "0.1.0"}}
    write_metrics(folder, settings, {**scores.metrics(), **more, **made})
    (folder / "mistakes").mkdir()
    frames = moving_frames(100, 1, 96).original[0]
    strip = np.concatenate([frames[t].numpy() for t in (1, 3, 5, 7)], axis=1)
    wrong = np.flatnonzero(score_MK.argmax(axis=1) != label_M)
    for video in wrong.tolist():
        Image.fromarray(strip).save(folder / "mistakes" / f"{video:08d}.jpg")
    return folder
