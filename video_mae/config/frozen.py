"""What the stages read that train no encoder: evaluate, predict, probe, extract."""

import math
from dataclasses import dataclass
from typing import Literal

from video_mae.config.data import ReadConfig
from video_mae.config.schema import knob, require, section

Precision = Literal["fp32", "bf16", "fp16"]
"""Of activations; weights stay float32."""
Kind = Literal["linear", "attentive", "knn"]
"""Of probes."""
Sampling = Literal["dense", "uniform"]
"""How the frames of a clip are chosen."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`video-mae evaluate MODEL_OR_RUN_FOLDER LIST key=value ...`, also under the deepspeed
    launcher.
    """

    output: str = knob(
        "",
        "folder for metrics.json, predictions.jsonl, classes.csv and confusion.png; empty: the run folder",
    )
    num_clips: int | None = knob(
        None,
        "clips of a video; null: 5 where the model takes dense clips, 2 where it takes uniform ones",
    )
    sampling: Sampling | None = knob(
        None,
        "how frames are chosen, where it is not as the model says: it was converted by a wrong guess",
    )
    stride: int | None = knob(
        None, "video frames from one frame of a dense clip to the next, likewise"
    )
    num_crops: int = knob(3, "crops of a clip along the longer side; 1 is the middle")
    antialias: bool | None = knob(
        None,
        "average what resizing leaves out, or not (OpenCV); null: as the model's classifier.antialias says",
    )
    skip_bad: bool = knob(
        False,
        "leave videos that cannot be decoded out of the figures, instead of counting them as wrong",
    )
    all_scores: bool = knob(
        False, "write the scores of all classes into predictions.jsonl, not only of the first five"
    )
    precision: Precision = knob("fp32", "of the activations; fp16 needs a GPU")
    kernels: Literal["auto", "reference", "triton"] = knob(
        "auto", "which implementation of the fused operations"
    )
    batch_size: int = knob(
        1,
        "videos that are handed over and copied at once; each goes through the model by itself, so that no figure "
        "depends on it",
    )
    num_workers: int | None = knob(
        None,
        "decoding processes a rank; null: one a core that it may use, at most 16; 0 decodes in one "
        "process",
    )
    data: ReadConfig = section(
        ReadConfig, "how the files are read; their list is LIST, and the model knows its stride"
    )

    def __post_init__(self) -> None:
        require(
            self.num_clips is None or self.num_clips >= 1,
            "num_clips",
            self.num_clips,
            "must be at least 1, or null",
        )
        for name, least in (("num_crops", 1), ("batch_size", 1)):
            require(
                getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}"
            )
        _check_workers(self.num_workers)
        unset = ReadConfig()
        require(
            self.data.source == unset.source,
            "data.source",
            self.data.source,
            "is not read: LIST is the word after the model",
        )
        require(
            self.data.stride == unset.stride,
            "data.stride",
            self.data.stride,
            "is not read: a classifier keeps that of its training, and `stride=` is another",
        )
        _check_stride(self.stride)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """`video-mae predict MODEL_OR_RUN_FOLDER VIDEO key=value ...`."""

    num_clips: int = knob(5, "clips, spread over the video")
    sampling: Sampling | None = knob(
        None,
        "how frames are chosen, where it is not as the model says: it was converted by a wrong guess",
    )
    stride: int | None = knob(
        None, "video frames from one frame of a dense clip to the next, likewise"
    )
    num_crops: int = knob(1, "crops of a clip along the longer side; 1 is the middle")
    top: int = knob(5, "how many classes are told, the most probable first")

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_crops", "top"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _check_stride(self.stride)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """`video-mae probe MODEL_OR_RUN_FOLDER train=LIST validation=LIST key=value ...`."""

    train: str = knob(
        "", "list file or folder of classes whose videos train the heads, and are the neighbours"
    )
    validation: str = knob("", "likewise: what each probe's settings are chosen on")
    test: str = knob("", "likewise: what only the chosen ones are tried on; may be empty")
    output: str = knob(
        "",
        "folder for metrics.json and table.txt; empty: probe/ in the run folder, probe_random/ for weights=random",
    )
    kind: Literal["linear", "attentive", "knn", "all"] = knob(
        "all",
        "a linear layer on the mean of the tokens, a query that attends to "
        "the tokens, or the votes of the nearest training videos",
    )
    weights: Literal["pretrained", "random"] = knob(
        "pretrained",
        "random: an encoder of the same architecture that has learned nothing, to compare with",
    )
    seed: int = knob(0, "of the heads, the order of the examples, augmentation, and random weights")
    sampling: Literal["dense", "uniform"] = knob(
        "dense",
        "how a clip's frames are chosen: data.stride apart, or one of each part of the video",
    )
    num_clips: int = knob(
        1, "clips of a video; in training each is an example, else their softmaxes are averaged"
    )
    num_crops: int = knob(1, "crops of a clip along the longer side, likewise; 1 is the middle")
    lrs: tuple[float, ...] = knob(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "learning rates of the grid, each with each weight decay; a cosine to 0",
    )
    weight_decays: tuple[float, ...] = knob((0.01, 0.1, 1.0), "weight decays of the grid (AdamW)")
    epochs: float = knob(50.0, "passes over the training list")
    batch_size: int = knob(64, "examples of an update")
    num_heads: int | None = knob(
        None, "attention heads of the attentive probe; null: as many as the encoder's"
    )
    ks: tuple[int, ...] = knob((1, 5, 20), "numbers of neighbours to choose from")
    temperature: float = knob(0.07, "of the neighbours' votes, exp(cosine / temperature)")
    augment: bool = knob(
        False,
        "draw clips and crops anew in every epoch, and encode them, instead of encoding the views once",
    )
    crop_areas: tuple[float, float] = knob((0.3, 1.0), "smallest and largest area of a drawn crop")
    flip: bool = knob(False, "mirror half of the drawn clips")
    cache: Literal["memory", "disk"] = knob(
        "memory",
        "where the tokens for the attentive probe lie, 2 bytes a value; disk: in the output "
        "folder, until the end",
    )
    precision: Precision = knob("fp32", "of the encoder's activations; fp16 needs a GPU")
    encode_batch: int = knob(8, "videos that go through the encoder at once")
    num_workers: int | None = knob(
        None, "decoding processes; null: one a core, at most 16; 0 decodes in one process"
    )
    data: ReadConfig = section(
        ReadConfig, "how the files of all lists are read; the lists are train, validation and test"
    )

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            require(
                getattr(self, name) != "",
                name,
                "(empty)",
                "must name a list file or a folder of classes",
            )
        require(
            self.data.source == "",
            "data.source",
            self.data.source,
            "is not read: the lists are train, validation and test",
        )
        for name, least in (
            ("num_clips", 1),
            ("num_crops", 1),
            ("batch_size", 2),
            ("encode_batch", 1),
        ):
            require(
                getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}"
            )
        _check_workers(self.num_workers)
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")
        require(0 < self.epochs < math.inf, "epochs", self.epochs, "must be above 0, finite")
        require(
            len(self.lrs) > 0 and all(0 < lr < math.inf for lr in self.lrs),
            "lrs",
            self.lrs,
            "must be one or more values above 0",
        )
        require(
            len(self.weight_decays) > 0
            and all(0 <= decay < math.inf for decay in self.weight_decays),
            "weight_decays",
            self.weight_decays,
            "must be one or more values, at least 0",
        )
        require(
            len(self.ks) > 0 and min(self.ks) >= 1,
            "ks",
            self.ks,
            "must be one or more numbers, at least 1",
        )
        require(
            0 < self.temperature < math.inf,
            "temperature",
            self.temperature,
            "must be above 0, finite",
        )
        require(
            0 < self.crop_areas[0] <= self.crop_areas[1] <= 1,
            "crop_areas",
            self.crop_areas,
            "must be increasing, in (0, 1]",
        )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of probes to make."""
        return ("linear", "attentive", "knn") if self.kind == "all" else (self.kind,)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """`video-mae extract MODEL_OR_RUN_FOLDER LIST_OR_VIDEO FOLDER key=value ...`, also under the
    deepspeed launcher.
    """

    level: Literal["pooled", "tokens", "pyramid"] = knob(
        "pooled",
        "a vector a clip; its tokens [time, row, column]; or those that leave "
        "each of `layers`, for dense tasks",
    )
    layers: tuple[int, ...] = knob(
        (),
        "blocks of a pyramid, the first is 0; empty: the ends of four equal parts of the encoder",
    )
    hop: int = knob(
        0,
        "video frames from the start of a clip to that of the next; 0: as many as a clip spans, num_frames * stride",
    )
    sampling: Sampling = knob(
        "dense",
        "dense: clips along the video, frames a stride apart; uniform: one clip, a frame of each of as many "
        "equal parts of the video as a clip has frames, as models of Something-Something take them",
    )
    stride: int | None = knob(
        None, "video frames from one frame of a dense clip to the next; null: data.stride"
    )
    crop: Literal["center", "whole"] = knob(
        "center",
        "what of a frame is resized to the model's size: the middle, or all of it, squeezed",
    )
    format: Literal["npz", "safetensors"] = knob("npz", "of the files, one a video")
    dtype: Literal["float32", "float16"] = knob("float32", "of the features in the files")
    precision: Precision = knob("fp32", "of the encoder's activations; fp16 needs a GPU")
    batch_size: int = knob(8, "clips of a video that go through the encoder at once")
    num_workers: int | None = knob(
        None,
        "decoding processes a rank, each on a video of its own; null: one a core that it may use, at most "
        "16; 0 decodes in one process",
    )
    data: ReadConfig = section(
        ReadConfig, "how the files are read, and how far the frames of a clip are apart"
    )

    def __post_init__(self) -> None:
        require(
            self.data.source == "",
            "data.source",
            self.data.source,
            "is not read: LIST_OR_VIDEO is the word after the model",
        )
        for name, least in (("hop", 0), ("batch_size", 1)):
            require(
                getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}"
            )
        _check_workers(self.num_workers)
        _check_stride(self.stride)
        unset = ReadConfig().stride
        require(
            self.stride is None or self.data.stride in (unset, self.stride),
            "stride",
            self.stride,
            f"and data.stride = {self.data.stride} are two values for one thing",
        )
        require(
            self.sampling == "dense" or not self.hop,
            "hop",
            self.hop,
            "is for sampling = dense: a uniform clip is all of the video",
        )
        require(
            not self.layers or self.level == "pyramid",
            "layers",
            self.layers,
            "are those of level=pyramid",
        )


def _check_stride(stride: int | None) -> None:
    require(stride is None or stride >= 1, "stride", stride, "must be at least 1, or null")


def _check_workers(num_workers: int | None) -> None:
    require(
        num_workers is None or num_workers >= 0,
        "num_workers",
        num_workers,
        "must be at least 0, or null",
    )
