"""What a classifier says about a video: the views of the video, merged, in Python and as a stage;
or windows along many videos, as a table.

V views of a video, K classes.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from video_mae.config import ClassifierConfig, ModelConfig
from video_mae.config.data import ReadConfig
from video_mae.config.evaluation import ExtractConfig, PredictConfig
from video_mae.config.schema import require
from video_mae.config.training import Precision
from video_mae.convert.model_folder import Model, choose_frames, load_pretrained
from video_mae.data.views import VideoViews, Views
from video_mae.decoding import Reading
from video_mae.evaluation.extract import Extraction
from video_mae.evaluation.features import autocast
from video_mae.evaluation.ranks import check_start
from video_mae.evaluation.scores import cell
from video_mae.files import one_line, say, write_text
from video_mae.model.vit import VideoClassifier


def start(model: str, sources: Sequence[str], config: PredictConfig) -> Callable[[], int] | int:
    """The stage as the command line starts it: one video as a whole; or with an output the table of
    all, which is returned, after the mistakes are raised.
    """
    check_start(config)
    loaded = load_pretrained(model, VideoClassifier)
    for line in choose_frames(loaded, config.sampling, config.stride or config.data.stride):
        say(line)
    if config.output:
        return PredictionTable(loaded, sources, config).run
    is_one = len(sources) == 1 and not Path(sources[0]).is_dir()
    remedy = "must name a file for what is said of several videos: output=predictions.csv"
    require(is_one, "output", "(empty)", remedy)
    for name, probability in classify_video(
        loaded, sources[0], num_clips=config.num_clips, num_crops=config.num_crops, top=config.top
    ):
        say(f"{probability:7.2%}  {name}")
    return 0


class PredictionTable(Extraction):
    """An extraction of what the head reads of windows along videos, which goes on like one, and the
    table of what the head says.
    """

    def __init__(
        self, model: VideoClassifier, sources: Sequence[str], config: PredictConfig
    ) -> None:
        self.head, self.asked = model.head, config
        head, folder = model.classifier_config, Path(f"{config.output}.parts")
        self.names = names_of(head)
        is_new = not Path(config.output).exists()
        remedy = f"exists without {folder}; choose another"
        require(is_new or folder.is_dir(), "output", config.output, remedy)
        # what was trained on whole videos sees them, or the windows that are asked for
        is_dense = head.sampling == "dense" or config.window > 0
        extracted = ExtractConfig(
            sampling="dense" if is_dense else "uniform",
            stride=-(-config.window // model.config.num_frames) or head.stride,
            hop=config.hop,
            batch_size=config.batch_size,
            precision=config.precision,
            num_workers=config.num_workers,
            data=config.data,
        )
        super().__init__(model, sources, folder, extracted)
        self.windows = replace(self.windows, antialias=head.antialias)

    @torch.no_grad()
    def conclude(self, bad: dict[int, str]) -> int:
        """Writes the table as well, in the order in which the videos were named."""
        top, rows = self.asked.top, [["path", "start_seconds", "end_seconds", "error"]]
        for place, _ in enumerate(self.names[:top], start=1):
            rows[0] += [f"class_{place}", f"probability_{place}"]
        self.head.cpu()
        for video, path in enumerate(self.paths):
            name = cell(str(path))
            if video in bad:
                rows.append([name, "", "", one_line(bad[video])] + [""] * (len(rows[0]) - 4))
                continue
            found = np.load(self.files[video])
            scores_CK = self.head(torch.from_numpy(found["features"])).softmax(dim=-1)
            times = zip(found["start_seconds"], found["end_seconds"], scores_CK, strict=True)
            for begin, end, score_K in times:
                rows.append([name, f"{begin:.3f}", f"{end:.3f}", ""])
                for k in score_K.argsort(descending=True)[:top].tolist():
                    rows[-1] += [cell(self.names[k]), f"{score_K[k]:.6f}"]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(Path(self.asked.output), text.getvalue())
        say(f"predictions {self.asked.output}")
        return super().conclude(bad)


def classify_video(
    model: Model, video: str | Path, *, num_clips: int = 5, num_crops: int = 1, top: int = 5
) -> list[tuple[str, float]]:
    """The `top` most probable classes of a video as (name, probability), wherever the model is, on
    a CPU or a GPU.

    Raises: ValueError for a model without classes, or a video that cannot be decoded.
    """
    if not isinstance(model, VideoClassifier):
        raise ValueError(
            f"model: a {type(model).__name__} has no classes, give a VideoClassifier (video-mae "
            "finetune makes one)"
        )
    views = views_of(model.config, model.classifier_config, num_clips, num_crops)
    logits_VK = view_logits(model, views.read(str(video)))
    scores_K, names = merge_views(logits_VK), names_of(model.classifier_config)
    first = scores_K.argsort(descending=True, stable=True)[:top].tolist()
    return [(names[k], float(scores_K[k])) for k in first]


def views_of(
    c: ModelConfig,
    head: ClassifierConfig,
    num_clips: int,
    num_crops: int,
    data: ReadConfig = ReadConfig(),  # noqa: B008  (frozen)
    threads: int = 1,
) -> Views:
    """The views of a test: of the model's size, with the frame sampling of a head."""
    return Views(
        num_frames=c.num_frames,
        height=c.height,
        width=c.width,
        sampling=head.sampling,
        stride=head.stride,
        num_clips=num_clips,
        num_crops=num_crops,
        antialias=head.antialias,
        reading=Reading.of(data, c.in_channels, threads=threads),
    )


def names_of(classifier: ClassifierConfig) -> tuple[str, ...]:
    """What the classes are called; `class 7` where nobody has named them."""
    return classifier.class_names or tuple(
        f"class {label}" for label in range(classifier.num_classes or 0)
    )


@torch.inference_mode()
def view_logits(
    model: VideoClassifier, views: VideoViews, precision: Precision = "fp32"
) -> torch.Tensor:
    """The outputs logits_VK for the views of a video.

    One forward pass holds all the views of the video and nothing else, so they depend on no other
    video.
    """
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    with autocast(device, precision):
        logits_VK = model(views.clips(device))
    model.train(was_training)
    return logits_VK


def merge_views(logits_VK: torch.Tensor) -> torch.Tensor:
    """The softmax of each view, then their mean: scores_K, float64 on the CPU. Any axes before V
    stay.

    Source: VideoMAE's test since August 2022.
    """
    return logits_VK.double().cpu().softmax(dim=-1).mean(dim=-2)
