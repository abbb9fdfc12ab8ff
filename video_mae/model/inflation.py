"""The same model for other clips: of another size, of video where it knew images, of images where
it knew video.

Letters: N tokens of a grid in raster order, D width, P values of a tubelet, C channels.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from einops import reduce, repeat
from torch import nn

from video_mae.config import ModelConfig
from video_mae.model.positions import Positions
from video_mae.model.vit import Encoder, VideoClassifier, VideoMAE

Model = TypeVar("Model", VideoMAE, VideoClassifier, Encoder)
State = dict[str, torch.Tensor]


def resized(
    model: Model,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Model:
    """A copy of a model whose own size is another: same weights, positions interpolated or computed
    anew as its configuration says.

    What is not given stays; learned tables are kept as they are and interpolated where they are
    read, so that resizing back loses nothing. Raises: ValueError for a size that is no multiple of
    the tubelet.
    """
    c = model.config
    changed = replace(
        c,
        num_frames=num_frames or c.num_frames,
        height=height or c.height,
        width=width or c.width,
        predicted_frames=None,
    )
    made_for = c.position_grid or c.grid
    changed = replace(changed, position_grid=None if made_for == changed.grid else made_for)
    if c.predicted_frames is not None:
        changed = replace(changed, predicted_frames=c.predicted_tubelet[0] * changed.grid[0])
    return _rebuilt(model, changed, model.state_dict())


def inflated(model: Model, num_frames: int, tubelet_size: int = 2) -> Model:
    """A video model from one of images (num_frames = tubelet_size = 1) that makes of a still clip
    what that made of the image.

    The embedding is repeated over the frames of a tubelet and divided by their number, the
    decoder's head is repeated: it predicts the image in every frame. Positions become learned ones
    of space, which are the image's, and of time, which start at 0. The class token is repeated for
    every frame of tokens, so that it keeps its share of the attention.
    Raises: ValueError for a model of video. Source: I3D (Carreira and Zisserman, 2017) for the
    weights, ViViT (Arnab et al., 2021) for the positions; the repeated class token is needed for
    equal outputs and is ours.
    """
    c = model.config
    if (c.num_frames, c.tubelet_size) != (1, 1):
        raise ValueError(
            f"model.num_frames: {c.num_frames} with model.tubelet_size = {c.tubelet_size} is a "
            "model of video; only one of images (1 and 1) can be inflated"
        )
    config = replace(
        c,
        num_frames=num_frames,
        tubelet_size=tubelet_size,
        positions="separate",
        position_grid=None,
        predicted_frames=None,
    )
    config = replace(config, class_tokens=c.class_tokens * config.grid[0])

    def tables(positions_ND: torch.Tensor) -> State:
        return {
            "space": positions_ND,
            "time": positions_ND.new_zeros(config.grid[0], positions_ND.shape[1]),
        }

    state = _with_positions(model, tables)
    for name, tensor in state.items():
        if name.endswith("patch_embed.weight"):
            state[name] = (
                repeat(tensor, "D (C p) -> D (C t p)", C=c.in_channels, t=tubelet_size)
                / tubelet_size
            )
        elif name.startswith("decoder.head.") and c.target_width is None:
            state[name] = repeat(tensor, "P ... -> (t P) ...", t=tubelet_size)
    return _rebuilt(model, config, state)


def deflated(model: Model) -> Model:
    """An image model from one of video: the embedding is summed over time, positions and the
    decoder's head are averaged.

    It takes back what `inflated` did; what a trained video model made of a still clip it keeps only
    in so far as nothing depends on time. Positions become a learned table of the image.
    """
    c = model.config
    config = replace(
        c,
        num_frames=1,
        tubelet_size=1,
        positions="learned",
        position_grid=None,
        predicted_frames=None,
        class_tokens=min(c.class_tokens, 1),
    )

    def tables(positions_ND: torch.Tensor) -> State:
        return {"table": reduce(positions_ND, "(t N) D -> N D", "mean", t=c.grid[0])}

    state = _with_positions(model, tables)
    for name, tensor in state.items():
        if name.endswith("patch_embed.weight"):
            state[name] = reduce(
                tensor, "D (C t p) -> D (C p)", "sum", C=c.in_channels, t=c.tubelet_size
            )
        elif name.startswith("decoder.head.") and c.target_width is None:
            state[name] = reduce(tensor, "(t P) ... -> P ...", "mean", t=c.predicted_tubelet[0])
    return _rebuilt(model, config, state)


@torch.no_grad()
def _with_positions(model: Model, tables: Callable[[torch.Tensor], State]) -> State:
    """The model's weights, with the tables that replace those of each of its positions."""
    state = model.state_dict()
    for name, part in model.named_modules():
        if isinstance(part, Positions):
            for key in part.state_dict():
                del state[f"{name}.{key}"]
            positions_ND, class_D = part(part.grid)
            for key, table in tables(positions_ND).items():
                state[f"{name}.{key}"] = table
            if model.config.class_tokens:
                state[f"{name}.class_row"] = torch.zeros_like(positions_ND[0]) + class_D
    return state


def _rebuilt(model: Model, config: ModelConfig, state: State) -> Model:
    """A model of the same kind with another configuration and these weights, on the same device."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    options: Any = {"impl": encoder.impl, "checkpointing": encoder.blocks.checkpointing}
    if isinstance(model, VideoMAE):
        rebuilt = VideoMAE(config, model.objective_config, **options)
        rebuilt.clips_config = model.clips_config
    elif isinstance(model, VideoClassifier):
        rebuilt = VideoClassifier(config, model.classifier_config, **options)
    else:
        has_norm = isinstance(model.norm, nn.LayerNorm)
        rebuilt = Encoder(config, final_norm=has_norm, **options)
    rebuilt.to(encoder.patch_embed.weight).load_state_dict(state)
    return rebuilt.train(model.training)  # pyright: ignore[reportReturnType]
