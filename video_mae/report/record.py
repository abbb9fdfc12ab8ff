"""What a run folder tells of its run. Any of its files may be missing, torn, or of an earlier
version.
"""

import csv
import json
import platform
import statistics
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from video_mae.config import FinetuneConfig, PretrainConfig
from video_mae.config.schema import knobs_of, read_keys
from video_mae.files import JsonObject, as_read_back, read_jsonl
from video_mae.results import METRICS_FILE

Lines = list[JsonObject]

FACTS_FILE = "run.json"
"""Of a training run: when it started and finished, its length, its device and versions."""
PACKAGES = ("video-mae", "torch", "deepspeed", "triton", "av")
TOLD_ELSEWHERE = (
    "output",
    "from_scratch",
    "classifier.class_names",
    "classifier.num_classes",
    "data.decoder",
    "model.position_grid",
    "model.target_width",
)
"""Keys that are no settings to look at, or that a run writes down as it has found them out."""
RECENT_LINES = 20  # of metrics.jsonl, whose pace is that of the rest
UNREAD = {
    "classifier.sampling=parts": "classifier.stride",
    "classifier.sampling=parts_v2": "classifier.stride",
    "classifier.sampling=uniform": "classifier.stride",
    "data.crop=center": "data.crop_scales",
    "lora.rank=0": "lora.alpha lora.targets",
    "objective.contrastive_weight=0.0": "objective.temperature objective.learn_temperature "
    "objective.negatives objective.contrastive_memory",
    "objective.target=features": "objective.normalize objective.pixels",
    "objective.target=pixels": "objective.teacher objective.min_rank objective.feature_loss",
    "optim.schedule=cosine": "optim.cooldown_",
    "optim.steps=None": "optim.warmup_steps optim.cooldown_steps",
    "probe.validation=": "probe.",
    "validation.source=": "validation.",
}
"""Settings, and the keys that nothing reads beside them, or how these begin."""


class RunRecord(NamedTuple):
    """A run folder as it was read: `settings` are its config.yaml by dotted keys, `answers` the
    videos of an evaluation, `classes` its table of classes.
    """

    name: str
    folder: Path
    facts: JsonObject
    settings: JsonObject
    lines: Lines
    bad_videos: Lines
    fallbacks: Lines
    metrics: JsonObject
    answers: Lines
    classes: Lines

    @property
    def stage(self) -> str:
        """The command that trained it: pretrain, finetune, or "" where there was no training."""
        if "classifier.num_classes" in self.settings:
            return "finetune"
        return "pretrain" if self.settings or self.lines else ""

    def lines_with(self, key: str) -> Lines:
        """`loss` is of lines about training, `val_loss` of those about validation."""
        return [line for line in self.lines if key in line]


class RunSetting(NamedTuple):
    """A key of a run's configuration."""

    key: str
    value: Any
    default: Any
    meaning: str


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder, or one of an evaluation."""
    lines = read_jsonl(folder / "metrics.jsonl")
    settings: JsonObject = {}
    with suppress(OSError, ValueError):
        settings = _flat(read_keys(folder / "config.yaml"))
    classes: Lines = []
    with suppress(OSError), (folder / "classes.csv").open(encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    return RunRecord(
        folder.resolve().name,
        folder,
        _read_json(folder / FACTS_FILE),
        settings,
        [line for line in lines if isinstance(line.get("step"), int)],
        read_jsonl(folder / "quarantine.jsonl"),
        read_jsonl(folder / "fallbacks.jsonl"),
        _read_json(folder / METRICS_FILE),
        read_jsonl(folder / "predictions.jsonl"),
        classes,
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide on a result."""
    found = dict[str, str]()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "python": platform.python_version()}


def summarize(run: RunRecord) -> JsonObject:
    """What lines say together, where they do: the medians of clips_per_second, data_wait and mfu,
    the `total` of the steps, and `eta`, the seconds that are left at the pace of the last lines.
    """
    training = run.lines_with("loss")
    found: JsonObject = {"total": run.facts.get("total_steps") or run.settings.get("optim.steps")}
    for key in ("clips_per_second", "data_wait", "mfu"):
        known = [line[key] for line in training if line.get(key) is not None]
        if known:
            found[key] = statistics.median(known)
    paces = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in pairwise(training[-RECENT_LINES:])
    ]
    if found["total"] and paces:
        found["eta"] = (found["total"] - training[-1]["step"]) * statistics.median(paces)
    return found


def list_settings(run: RunRecord) -> tuple[list[RunSetting], list[RunSetting], list[RunSetting]]:
    """The settings of a run that are not the defaults, those that are, and those that nothing
    reads, whatever they are.
    """
    known = knobs_of(FinetuneConfig if run.stage == "finetune" else PretrainConfig)
    unread = [UNREAD.get(f"{key}={value}", "") for key, value in run.settings.items()]
    if run.settings.get("optim.steps") is not None:
        unread.append("optim.epochs optim.warmup_epochs optim.cooldown_epochs")
    if run.stage == "finetune":
        unread.append("data.stride data.reach_end model.decoder_")
    beginnings = tuple(" ".join(unread).split())
    changed, kept, idle = [], [], []
    for key, value in run.settings.items():
        if key in TOLD_ELSEWHERE:
            continue
        default, meaning = known.get(key, (None, ""))
        setting = RunSetting(key, value, as_read_back(default), meaning)
        if key.startswith(beginnings):
            idle.append(setting)
        elif value != setting.default:
            changed.append(setting)
        else:
            kept.append(setting)
    return changed, kept, idle


def _flat(values: JsonObject, prefix: str = "") -> JsonObject:
    """{"optim.steps": 5} of {"optim": {"steps": 5}}."""
    flat: JsonObject = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_json(path: Path) -> JsonObject:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    return {}
