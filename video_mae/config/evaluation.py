"""What the stages read that train no encoder: evaluate, predict, probe, extract."""

from typing import Literal

from video_mae.config.data import GivenReadConfig
from video_mae.config.schema import MOST_SIZE, Knobs, knob, require, section
from video_mae.config.training import Precision

ProbeKind = Literal["linear", "attentive", "knn"]
"""Of probes."""
ClipSampling = Literal["dense", "uniform"]
"""How the frames of a clip are chosen."""


class EncodingConfig(Knobs):
    """What the stages have that encode the videos of lists."""

    precision: Precision = knob(
        "fp32", "of the activations; weights stay float32; fp16 needs a GPU"
    )
    num_workers: int | None = knob(
        None,
        "decoding processes a rank; null: one a core that it may use, at most 16; 0 decodes in one "
        "process",
        low=0,
    )
    data: GivenReadConfig = section(
        GivenReadConfig,
        "how the files of all lists are read, and how far a clip's frames are apart",
    )


class WindowsConfig(EncodingConfig):
    """How clips lie along videos."""

    hop: int = knob(
        0,
        "video frames from the start of a clip to that of the next; 0: as many as a clip spans, "
        "num_frames * stride",
        low=0,
    )
    batch_size: int = knob(
        8, "clips of a video that go through the encoder at once", low=1, high=MOST_SIZE
    )


class TestedConfig(EncodingConfig):
    """How a classifier is given frames, where it is not as the model says."""

    sampling: ClipSampling | None = knob(
        None,
        "how frames are chosen, where it is not as the model says: it was converted by a wrong "
        "guess",
    )
    stride: int | None = knob(
        None, "video frames from one frame of a dense clip to the next, likewise", low=1
    )


class EvaluateConfig(TestedConfig):
    """`video-mae evaluate MODEL_OR_RUN_FOLDER LIST key=value ...`, also under the deepspeed
    launcher.
    """

    first_keys = (
        "output num_clips num_crops sampling stride precision num_workers skip_bad all_scores "
        "data.root"
    )
    output: str = knob(
        "",
        "folder for metrics.json, predictions.jsonl, classes.csv and report.html; empty: the "
        "run folder",
    )
    num_clips: int | None = knob(
        None,
        "clips of a video; null: 5 where the model takes dense clips, 2 where it takes uniform "
        "ones",
        low=1,
        high=1000,
    )
    num_crops: int = knob(
        3, "crops of a clip along the longer side; 1 is the middle", low=1, high=1000
    )
    antialias: bool | None = knob(
        None,
        "average what resizing leaves out, or not (OpenCV); null: as the model's "
        "classifier.antialias says",
    )
    skip_bad: bool = knob(
        False,
        "leave videos that cannot be decoded out of the figures, instead of counting them as wrong",
    )
    all_scores: bool = knob(
        False, "write the scores of all classes into predictions.jsonl, not only of the first five"
    )
    kernels: Literal["auto", "reference", "triton"] = knob(
        "auto", "which implementation of the fused operations"
    )
    batch_size: int = knob(
        1,
        "half of the videos that each worker keeps ready; each goes through the model by itself, "
        "so that no figure depends on it",
        low=1,
        high=MOST_SIZE,
    )


class PredictConfig(TestedConfig, WindowsConfig):
    """`video-mae predict MODEL_OR_RUN_FOLDER FOLDER_OR_FILES... key=value ...`."""

    first_keys = "output window hop num_clips num_crops top sampling stride batch_size precision"

    output: str = knob(
        "",
        "CSV file with a row for each clip along the videos, made of OUTPUT.parts; empty: one "
        "video is told as a whole",
    )
    window: int = knob(
        0,
        "with output: video frames over which those of a clip are spread; 0: as the model was "
        "trained, num_frames * stride, or all where that was on whole videos",
        low=0,
    )
    num_clips: int = knob(5, "without output: clips, spread over the video", low=1, high=1000)
    num_crops: int = knob(
        1,
        "without output: crops of a clip along the longer side; 1 is the middle",
        low=1,
        high=1000,
    )
    top: int = knob(5, "how many classes are told, the most probable first", low=1)


class ProbeConfig(EncodingConfig):
    """`video-mae probe MODEL_OR_RUN_FOLDER train=LIST validation=LIST key=value ...`."""

    first_keys = "train validation test output kind weights num_clips epochs precision num_workers"
    train: str = knob(
        "",
        "list file or folder of classes whose videos train the heads, and are the neighbours",
        filled=True,
    )
    validation: str = knob("", "likewise: what each probe's settings are chosen on", filled=True)
    test: str = knob("", "likewise: what only the chosen ones are tried on; may be empty")
    output: str = knob(
        "",
        "folder for metrics.json and table.txt; empty: probe/ in the run folder, probe_random/ "
        "for weights=random",
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
    seed: int = knob(
        0,
        "of the heads, the order of the examples, augmentation, and random weights",
        low=0,
        below=2**63,
    )
    sampling: ClipSampling | None = knob(
        None,
        "how a clip's frames are chosen: data.stride apart, or one of each part of the video; "
        "null: as the model was trained",
    )
    num_clips: int = knob(
        1,
        "clips of a video; in training each is an example, else their softmaxes are averaged",
        low=1,
        high=1000,
    )
    num_crops: int = knob(
        1, "crops of a clip along the longer side, likewise; 1 is the middle", low=1, high=1000
    )
    lrs: tuple[float, ...] = knob(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "learning rates of the grid, each with each weight decay; a cosine to 0",
        filled=True,
        above=0,
    )
    weight_decays: tuple[float, ...] = knob(
        (0.01, 0.1, 1.0), "weight decays of the grid (AdamW)", filled=True, low=0
    )
    epochs: float = knob(50.0, "passes over the training list", above=0)
    batch_size: int = knob(64, "examples of an update", low=2, high=MOST_SIZE)
    num_heads: int | None = knob(
        None, "attention heads of the attentive probe; null: as many as the encoder's"
    )
    ks: tuple[int, ...] = knob(
        (1, 5, 20), "numbers of neighbours to choose from", filled=True, low=1
    )
    temperature: float = knob(0.07, "of the neighbours' votes, exp(cosine / temperature)", above=0)
    augment: bool = knob(
        False,
        "draw clips and crops anew in every epoch, and encode them, instead of encoding the views "
        "once",
    )
    flip: bool = knob(False, "mirror half of the drawn clips")
    cache: Literal["memory", "disk"] = knob(
        "memory",
        "where the tokens for the attentive probe lie, 2 bytes a value; disk: in the output "
        "folder, until the end",
    )
    encode_batch: int = knob(8, "videos that go through the encoder at once", low=1, high=MOST_SIZE)

    @property
    def kinds(self) -> tuple[ProbeKind, ...]:
        """The kinds of probes to make."""
        return ("linear", "attentive", "knn") if self.kind == "all" else (self.kind,)


class ExtractConfig(WindowsConfig):
    """`video-mae extract MODEL_OR_RUN_FOLDER LIST_OR_VIDEO FOLDER key=value ...`, also under the
    deepspeed launcher.
    """

    first_keys = "level layers hop sampling stride format dtype batch_size precision num_workers"
    level: Literal["pooled", "tokens", "pyramid"] = knob(
        "pooled",
        "a vector a clip; its tokens [time, row, column]; or those that leave "
        "each of `layers`, for dense tasks",
    )
    layers: tuple[int, ...] = knob(
        (),
        "blocks of a pyramid, the first is 0; empty: the ends of four equal parts of the encoder",
    )
    sampling: ClipSampling | None = knob(
        None,
        "dense: clips along the video, frames a stride apart; uniform: one clip, a frame of each "
        "of as many equal parts of the video as a clip has frames, as models of "
        "Something-Something take them; null: as the model was trained, and dense where hop is "
        "given",
    )
    stride: int | None = knob(None, "as data.stride, which it wins over", low=1)
    crop: Literal["center", "whole"] = knob(
        "center",
        "what of a frame is resized to the model's size: the middle, or all of it, squeezed",
    )
    format: Literal["npz", "safetensors"] = knob("npz", "of the files, one a video")
    dtype: Literal["float32", "float16"] = knob("float32", "of the features in the files")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.sampling != "uniform" or not self.hop,
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
