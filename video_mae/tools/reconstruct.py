"""The reconstruction stage: a pretrained model folder, a video, a picture of what the model makes
of the hidden tubelets.
"""

from functools import partial
from pathlib import Path

import torch

from video_mae.config import MaskConfig
from video_mae.config.schema import Knobs, knob, section
from video_mae.convert.model_folder import load_pretrained
from video_mae.data.augment import central_box, crop_clip
from video_mae.data.sampling import sample_rng, sample_seed
from video_mae.decoding import VideoDecodeError, decode
from video_mae.decoding.choices import clip_indices, joined
from video_mae.files import say
from video_mae.model.masking import mask_counts, token_mask
from video_mae.model.objective import pixel_scale, predicted_clip
from video_mae.model.vit import VideoMAE
from video_mae.training.picture import Statistics, draw_reconstruction, reconstruction_frames


class ReconstructConfig(Knobs):
    """`video-mae reconstruct MODEL VIDEO PICTURE.png key=value ...`."""

    seed: int = knob(0, "of the clips, boxes and masks", low=0)
    num_clips: int = knob(2, "clips drawn from the video", low=1, high=1000)
    stride: int = knob(
        4, "video frames from one frame of the clip to the next; take that of the training", low=1
    )
    statistics: Statistics = knob(
        "visible",
        "whose mean and deviation undo the normalisation: of the visible tubelets, or of the true "
        "hidden ones, which a model does not have",
    )
    mask: MaskConfig = section(MaskConfig, "masking")


def start(model_folder: str, video: str, picture: str, config: ReconstructConfig) -> int:
    """Draws clips of a video, their visible tubelets and the model's predictions, as the command
    line starts it.

    Raises: FileNotFoundError; ValueError naming the file or key that does not fit, also for a video
    that cannot be decoded.
    """
    model = load_pretrained(model_folder, VideoMAE)
    if model.config.target_width is not None:
        raise ValueError(f"{model_folder}: predicts features, there are no pixels to draw")
    size = (model.config.height, model.config.width)
    mask_counts(model.grid, config.mask.kind, config.mask.ratio, config.mask.decoder_mask_ratio)
    rngs = [sample_rng(config.seed, 0, 0, draw) for draw in range(config.num_clips)]
    choose = partial(clip_indices, num_frames=model.config.num_frames, stride=config.stride)
    # all clips from one pass over the file
    all_clips = partial(joined, choices=[partial(choose, rng=rng) for rng in rngs])
    try:
        frames_THWC = torch.from_numpy(decode(str(video), all_clips))
    except VideoDecodeError as error:
        raise ValueError(str(error)) from None
    height, width = frames_THWC.shape[1:3]
    box = central_box(height, width, size[1] / size[0])
    clip_BTHWC = torch.stack(crop_clip(frames_THWC, box, size, flip=False).chunk(config.num_clips))
    seeds_B = torch.tensor(
        [sample_seed(config.seed, 0, 0, draw) for draw in range(config.num_clips)]
    )
    mask = token_mask(
        seeds_B,
        model.grid,
        config.mask.kind,
        config.mask.ratio,
        config.mask.decoder_mask_ratio,
        model.config.decoder_context,
    )
    with torch.no_grad():
        predicted_BMP = model.predict(clip_BTHWC, mask)
    titles = [f"{Path(video).name}, clip {draw + 1}" for draw in range(config.num_clips)]
    frames = reconstruction_frames(
        predicted_clip(clip_BTHWC, model.config),
        mask.visible_BV,
        mask.masked_BM,
        predicted_BMP,
        model.config.predicted_tubelet,
        model.objective_config.normalize,
        config.statistics,
        pixel_scale(model.config, model.objective_config),
    )
    draw_reconstruction(Path(picture), frames, titles)
    say(f"picture {picture}")
    return 0
