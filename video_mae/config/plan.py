"""What `video-mae plan` reads."""

from pathlib import Path
from typing import Literal

from video_mae.config.finetune import FinetuneConfig
from video_mae.config.schema import Knobs, knob, read_keys
from video_mae.config.training import PretrainConfig

FIRST_KEYS = (
    "gpus gpu nodes network videos page optim.global_batch optim.epochs engine.precision "
    "data.clips_per_video"
)


class PlanKeys(Knobs):
    """What a run is planned for."""

    gpus: int = knob(8, "how many GPUs", low=1)
    nodes: int | None = knob(
        None, "machines that they are in, with equal shares; null: with up to 8 GPUs each", low=1
    )
    gpu: Literal["h100", "h200", "b200", "a100", "v100", "l40s", "a10"] = knob(
        "h100", "which; video_mae/config/machines.yaml has their data sheets"
    )
    network: Literal["ndr400", "hdr200", "ethernet100"] = knob(
        "ndr400",
        "between machines: InfiniBand with 400 or 200 Gb/s a GPU, Ethernet with 100 Gb/s a machine",
    )
    videos: int = knob(
        0,
        "in each list; 0: as many as it has where it is here, else as published, where its path "
        "names a known data set",
        low=0,
    )
    page: str = knob("", "a Markdown file of all that is printed, and a plot beside it")


class PretrainPlanConfig(PretrainConfig, PlanKeys):
    """`video-mae plan CONFIG.yaml key=value ...` for a configuration of `pretrain`."""

    first_keys = FIRST_KEYS


class FinetunePlanConfig(FinetuneConfig, PlanKeys):
    """Likewise, of `finetune`."""

    first_keys = FIRST_KEYS


PlanConfig = PretrainPlanConfig | FinetunePlanConfig


def plan_schema(path: str = "") -> type[PlanKeys]:
    """That of `finetune` where a file, or its base, has keys that `pretrain` lacks. Raises:
    FileNotFoundError; ValueError.
    """
    keys = read_keys(Path(path)) if path else {}
    base = Path(path).parent / str(keys.get("base"))
    if base.is_file():  # else whoever reads the whole of it will say so
        keys |= read_keys(base)
    own = FinetuneConfig.__dataclass_fields__.keys() - PretrainConfig.__dataclass_fields__.keys()
    return FinetunePlanConfig if own & keys.keys() else PretrainPlanConfig
