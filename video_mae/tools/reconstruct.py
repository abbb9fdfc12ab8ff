"""The reconstruction stage: pictures of what a pretrained model makes of the hidden tubelets of
videos.
"""

from collections.abc import Sequence

import torch

from video_mae.config.clips import ReconstructConfig
from video_mae.convert.model_folder import load_pretrained
from video_mae.data.sampling import sample_seed
from video_mae.evaluation.features import clips_of
from video_mae.evaluation.look import draw_videos
from video_mae.model.masking import token_mask
from video_mae.model.objective import pixel_scale, predicted_clip
from video_mae.model.vit import VideoMAE
from video_mae.training.picture import PictureFrames, reconstruction_frames


def start(model_folder: str, videos: Sequence[str], config: ReconstructConfig) -> int:
    """Draws clips of videos, their visible tubelets and the model's predictions, as the command
    line starts it.

    Raises: FileNotFoundError; ValueError naming the file or key that does not fit, also for a video
    that cannot be decoded.
    """
    model = load_pretrained(model_folder, VideoMAE)
    if model.config.target_width is not None:
        raise ValueError(f"{model_folder}: predicts features, there are no pixels to draw")
    given, trained, c = config.mask, clips_of(model).mask, model.config
    kind, ratio = given.kind or trained.kind, given.ratio or trained.ratio
    seeds = [sample_seed(config.seed, 0, 0, clip) for clip in range(config.num_clips)]
    mask = token_mask(
        torch.tensor(seeds), model.grid, kind, ratio, given.decoder_mask_ratio, c.decoder_context
    )

    def reconstruct(clip_BTHWC: torch.Tensor) -> PictureFrames:
        return reconstruction_frames(
            predicted_clip(clip_BTHWC, c),
            *mask[:2],
            model.predict(clip_BTHWC, mask),
            c.predicted_tubelet,
            model.objective_config.normalize,
            config.statistics,
            pixel_scale(c, model.objective_config),
        )

    return draw_videos(model, videos, config, reconstruct)
