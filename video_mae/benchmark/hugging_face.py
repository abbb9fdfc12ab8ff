"""The training step of Hugging Face's VideoMAEForPreTraining, with our weights: what `video-mae
bench step` compares with.

Its decoder and its loss always take every hidden token: there is no dual masking.
Letters: B clips, T frames, H W pixels, C channels, N tokens, V visible, M masked.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms.v2 import functional as F

from video_mae.benchmark.timeline import Border
from video_mae.config import ModelConfig
from video_mae.convert.export import export_hugging_face
from video_mae.model.masking import TokenMask
from video_mae.model.vit import VideoMAE

if TYPE_CHECKING:
    from transformers import VideoMAEForPreTraining


def hugging_face_model(model: VideoMAE) -> "VideoMAEForPreTraining":
    """Their model with the architecture, weights and epsilons of ours, attention by SDPA, in
    training mode.

    Raises: ImportError without transformers; ValueError for a model of ours that theirs cannot be.
    """
    from transformers import VideoMAEForPreTraining
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as workshop:
        export_hugging_face(model, Path(workshop) / "model")
        theirs: VideoMAEForPreTraining = VideoMAEForPreTraining.from_pretrained(
            Path(workshop) / "model", attn_implementation="sdpa"
        )
    # the one epsilon that their configuration leaves out
    theirs.decoder.norm.eps = model.config.head_norm_eps
    return theirs.train()


def prepare(
    clip_BTHWC: torch.Tensor, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What their model wants of a uint8 clip: (B, T, C, H, W), normalised, in two passes over it.

    The cheapest way that we know; scaling to [0, 1] is folded into the normalisation, as their own
    processors do.
    """
    floats_BTCHW = clip_BTHWC.permute(0, 1, 4, 2, 3).to(
        torch.float32, memory_format=torch.contiguous_format
    )
    mean, std = ([255 * value for value in values] for values in (config.mean, config.std))
    return F.normalize(floats_BTCHW, mean, std, inplace=True).to(dtype)


def processor(config: ModelConfig) -> Any:
    """Their own way to prepare clips, without resizing: `processor(list of uint8 (T, C, H, W),
    return_tensors="pt")`.
    """
    from transformers.models.videomae.video_processing_videomae import VideoMAEVideoProcessor

    return VideoMAEVideoProcessor(
        image_mean=config.mean, image_std=config.std, do_resize=False, do_center_crop=False
    )


def boolean_mask(mask: TokenMask, num_tokens: int) -> torch.Tensor:
    """Their mask [B, N]: True where a token is hidden. The mask must predict everything that it
    hides.
    """
    hidden_BN = torch.ones(
        len(mask.visible_BV), num_tokens, dtype=torch.bool, device=mask.visible_BV.device
    )
    return hidden_BN.scatter(1, mask.visible_BV, False)


def borders_of(model: "VideoMAEForPreTraining") -> list[Border]:
    """Between the parts of their model, as `timeline.borders_of` has them for ours; a forward pass
    begins with `embed`.
    """

    def attention(layers: Any, name: str) -> list[Border]:
        around: list[Border] = []
        for layer in layers:  # the query comes after key and value
            around += [
                Border(
                    layer.attention.attention.query, "output", f"{name} rest", f"{name} attention"
                ),
                Border(layer.attention.output.dense, "input", f"{name} attention", f"{name} rest"),
            ]
        return around

    encoder, decoder = model.videomae.encoder, model.decoder
    return [
        Border(encoder.layer[0], "input", "embed", "encoder rest"),
        *attention(encoder.layer, "encoder"),
        Border(model.encoder_to_decoder, "input", "encoder rest", "decoder rest"),
        *attention(decoder.decoder_layers, "decoder"),
        Border(decoder.head, "output", "decoder rest", "losses"),
    ]
