"""The stage that looks at features: the principal components of a video's tokens as colours, and
where the vector of a clip comes from; and what it shares with others that draw videos.

B clips, T frames, H W pixels, C channels, N patch tokens, A queries, S all tokens, D features, h
heads, d features of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from video_mae.config import ClassifierConfig
from video_mae.config.clips import LookConfig, PictureConfig
from video_mae.convert.model_folder import Model, load_pretrained
from video_mae.decoding.transcode import write_video
from video_mae.evaluation.extract import file_name
from video_mae.evaluation.features import clips_of
from video_mae.evaluation.predict import views_of
from video_mae.files import check_folder, say, write_whole
from video_mae.model.vit import VideoClassifier
from video_mae.training.picture import (
    FRAMES_PER_SECOND,
    Frames,
    LookFrames,
    arrange,
    draw_reconstruction,
    in_colors,
)


def start(model_folder: str, videos: Sequence[str], config: LookConfig) -> int:
    """The stage as the command line starts it."""
    model = load_pretrained(model_folder)
    return draw_videos(model, videos, config, partial(look, model))


@torch.no_grad()
def draw_videos(
    model: Model,
    videos: Sequence[str],
    config: PictureConfig,
    make: Callable[[Tensor], Frames],
) -> int:
    """Writes a PNG and an MP4 of each video, where `make` has the frames of clips [B, T, H, W, C]
    of the model's size. Returns the exit status.

    Raises: ValueError for a folder that cannot be, or a video that cannot be decoded, before
    anything is written.
    """
    output, clips = Path(config.output), clips_of(model)
    check_folder(output)
    stride = config.stride or config.data.stride or clips.stride
    frames = ClassifierConfig(sampling=clips.sampling, stride=stride)
    views = views_of(model.config, frames, config.num_clips, 1, config.data)
    found = [views.read(video) for video in videos]
    for video, viewed in zip(videos, found, strict=True):
        shown = make(viewed.clips())
        picture = output / file_name(video, "png")
        film = picture.with_suffix(".mp4")
        titles = [
            f"{Path(video).name}, {clips.sampling} frames, stride {stride}, clip {clip + 1}"
            for clip in range(config.num_clips)
        ]
        draw_reconstruction(picture, shown, titles)
        say(f"picture  {picture}")
        if model.config.num_frames > 1:
            write_whole(film, partial(animate, frames=shown))
            say(f"video    {film}")
    return 0


def animate(path: Path, frames: Frames) -> None:
    """Writes an MP4 of all frames: those of a clip side by side, under the names of their rows."""
    *rows, notes = frames
    rows_BTRHWC = torch.stack([in_colors(row) for row in rows], dim=2)
    titles = [frames._fields[:-1]] * len(rows_BTRHWC)
    film = [np.asarray(arrange([row], [""], notes, titles)) for row in rows_BTRHWC.unbind(dim=1)]
    write_video(path, np.stack(film), FRAMES_PER_SECOND)


def look(model: Model, clip_BTHWC: Tensor) -> LookFrames:
    """What a picture shows of clips: their frames; the `principal_components` of all their tokens
    as red, green and blue; and their `pooled_attention` over the frames, from black over red and
    yellow to white. Each goes from the least to the most that there is in the clips.

    Source: the pictures of DINO (Caron et al., 2021) and DINOv2 (Oquab et al., 2023).
    """
    tokens_BND, weight_BN = pooled_attention(model, clip_BTHWC)
    maps_BN4 = torch.cat([principal_components(tokens_BND), weight_BN[..., None]], dim=2)
    low_4, high_4 = maps_BN4.flatten(0, 1).aminmax(dim=0)
    # what is the same everywhere is grey
    maps = ((maps_BN4 - low_4) / (high_4 - low_4)).nan_to_num(0.5)
    maps = maps.unflatten(1, model.encoder.grid_of(clip_BTHWC)).movedim(-1, 1)
    maps = F.interpolate(maps, clip_BTHWC.shape[1:4], mode="trilinear").movedim(1, -1)
    video, heat = in_colors(clip_BTHWC), (3 * maps[..., 3:] - torch.arange(3)).clamp(0, 1)
    return LookFrames(
        video,
        maps[..., :3],
        0.6 * heat + 0.4 * video / 255,
        "features: the first three principal components of the tokens as colours\n"
        "attention: of the clip's vector in the last block, mean of its heads",
    )


def principal_components(tokens_BND: Tensor) -> Tensor:
    """The first three principal components of all tokens, float64 [B, N, 3].

    The sign of a component is the one in which the cubes of its weights have a positive sum, so
    that it is the same each time.
    """
    x_ND = tokens_BND.flatten(0, 1).double()
    x_ND = x_ND - x_ND.mean(dim=0)
    axis_D3 = torch.linalg.eigh(x_ND.T @ x_ND).eigenvectors[:, -3:].flip(1)
    value_N3 = x_ND @ (axis_D3 * (axis_D3**3).sum(dim=0).sign())
    return value_N3.unflatten(0, tokens_BND.shape[:2])


def pooled_attention(model: Model, clip_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """The patch tokens [B, N, D] of clips, and how the vector of a clip attends to them in the last
    block [B, N]: softmax(q k^T / sqrt(d)), mean of the heads.

    q is that of the class token, where the vector is read from it (DINO, Caron et al., 2021; the
    mean of several). Where it is the mean of the tokens, none of them
    stands for it, and q is their mean query: what an attentive head with that query would look at
    (V-JEPA, Bardes et al., 2024).
    """
    c, kept = model.config, list[Tensor]()
    num_first, pooling = c.class_tokens, "first" if c.class_tokens else "mean"
    if isinstance(model, VideoClassifier):
        pooling = model.classifier_config.pooling
    last = model.encoder.get_submodule(f"blocks.{c.depth - 1}.attn.qkv")
    hook = last.register_forward_hook(lambda *call: kept.append(call[-1]))
    tokens_BSD = model.encoder(clip_BTHWC)
    hook.remove()
    q, k, _ = rearrange(kept[0], "b s (three h d) -> three b h s d", three=3, h=c.num_heads)
    asked = slice(num_first or 1) if pooling == "first" else slice(num_first, None)
    score_BhS = torch.einsum("bhd,bhsd->bhs", q[:, :, asked].mean(dim=2), k)
    weight_BS = (score_BhS / k.shape[3] ** 0.5).softmax(dim=2).mean(dim=1)
    return tokens_BSD[:, num_first:], weight_BS[:, num_first:]
