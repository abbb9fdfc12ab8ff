"""What a classifier says about a video: the views of the video, merged; in Python and as a stage.

V views of a video, K classes.
"""

from pathlib import Path

import torch

from video_mae.config import ClassifierConfig, ModelConfig
from video_mae.config.data import ReadConfig
from video_mae.config.evaluation import PredictConfig
from video_mae.config.training import Precision
from video_mae.convert.model_folder import Model, choose_frames, find_model_folder, load_pretrained
from video_mae.data.views import VideoViews, Views
from video_mae.decoding import Reading, VideoDecodeError
from video_mae.evaluation.features import autocast
from video_mae.files import say
from video_mae.model.vit import VideoClassifier


def start(model_folder: str, video: str, config: PredictConfig) -> int:
    """The stage as the command line starts it."""
    model = load_pretrained(find_model_folder(model_folder), VideoClassifier)
    for line in choose_frames(model, config.sampling, config.stride):
        say(line)
    for name, probability in classify_video(
        model, video, num_clips=config.num_clips, num_crops=config.num_crops, top=config.top
    ):
        say(f"{probability:7.2%}  {name}")
    return 0


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
    try:
        views = views_of(model.config, model.classifier_config, num_clips, num_crops)
        viewed = views.read(str(video))
    except VideoDecodeError as error:
        raise ValueError(str(error)) from None
    scores_K, names = merge_views(view_logits(model, viewed)), names_of(model.classifier_config)
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
