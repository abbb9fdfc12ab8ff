"""The features of a frozen encoder: of clips, and of all videos of a list once, for probes.

B clips, T frames, H W pixels, C channels, N tokens, D features, L chosen blocks, M videos, V views
of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from video_mae.config.evaluation import Precision
from video_mae.convert.model_folder import Model
from video_mae.data.dataset import Failure
from video_mae.data.labels import LabeledVideos
from video_mae.data.views import ViewDataset, Views, make_view_loader
from video_mae.model.vit import VideoClassifier


def check_precision(precision: Precision) -> None:
    """Raises: ValueError for fp16 without a GPU."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision: fp16 needs a GPU; use bf16 or fp32")


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass in a precision."""
    return torch.autocast(
        device.type,
        torch.float16 if precision == "fp16" else torch.bfloat16,
        enabled=precision != "fp32",
    )


class Features(NamedTuple):
    """Of clips: patch tokens [B, N, D] in raster order (class tokens are left out), and one vector
    each [B, D]; float32.
    """

    tokens_BND: torch.Tensor
    pooled_BD: torch.Tensor


class FrozenEncoder:
    """The encoder of a model on a device, without gradients, dropout or drop path.

    The tokens are those that the encoder gives, normed where it ends with a norm. The vector is
    what a classifier's head reads, and the mean of the tokens of a model without a head.
    """

    def __init__(self, model: Model, device: torch.device, precision: Precision = "fp32") -> None:
        self.model, self.config = model.to(device).eval(), model.config
        self.device = device
        self.precision: Precision = precision

    @torch.no_grad()
    def __call__(self, clip_BTHWC: torch.Tensor) -> Features:
        """clip_BTHWC: uint8, on any device."""
        with autocast(self.device, self.precision):
            tokens_BSD = self.model.encoder(clip_BTHWC.to(self.device, non_blocking=True)).float()
            tokens_BND = tokens_BSD[:, self.config.class_tokens :]
            model = self.model
            pooled_BD = (
                model.pool(tokens_BSD)
                if isinstance(model, VideoClassifier)
                else tokens_BND.mean(dim=1)
            )
        return Features(tokens_BND, pooled_BD.float())

    @torch.no_grad()
    def pyramid(self, clip_BTHWC: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """Patch tokens [B, L, N, D] as they leave the blocks `layers` (0 is the first), before the
        encoder's norm; float32.
        """
        found: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> "torch.utils.hooks.RemovableHandle":
            def hook(
                module: nn.Module, inputs: tuple[torch.Tensor, ...], output_BSD: torch.Tensor
            ) -> None:
                found[layer] = output_BSD[:, self.config.class_tokens :].float()

            return self.model.encoder.blocks[layer].register_forward_hook(hook)

        handles = [keep(layer) for layer in layers]
        try:
            with autocast(self.device, self.precision):
                self.model.encoder(clip_BTHWC.to(self.device, non_blocking=True))
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[layer] for layer in layers], dim=1)


@dataclass(frozen=True)
class FeatureSet:
    """The features of the views of a list: float32 [M, V, D] in memory; tokens float16 [M, V, N,
    D], in memory or in a mapped file.

    seen_M: whether a video could be decoded; where not, its features are 0.
    """

    pooled_MVD: torch.Tensor
    tokens_MVND: torch.Tensor | None
    label_M: torch.Tensor
    seen_M: torch.Tensor
    failures: tuple[Failure, ...]


def collect_features(
    encoder: FrozenEncoder,
    videos: LabeledVideos,
    views: Views,
    *,
    with_tokens: bool,
    file: Path | None,
    batch_size: int,
    num_workers: int,
    what: str,
) -> FeatureSet:
    """Encodes all views of all videos once. file: where the tokens lie, None for memory; it may be
    deleted while they are in use.
    """
    config, shape = encoder.config, (len(videos), views.num_clips * views.num_crops)
    pooled_MVD, tokens_MVND = torch.zeros(*shape, config.embed_dim), None
    if with_tokens:
        size = (*shape, config.num_tokens, config.embed_dim)
        tokens_MVND = torch.from_numpy(
            np.zeros(size, np.float16)
            if file is None
            else np.memmap(file, np.float16, "w+", shape=size)
        )
    seen_M, failures = torch.zeros(len(videos), dtype=torch.bool), []
    loader = make_view_loader(
        ViewDataset(videos.paths, views), range(len(videos)), batch_size, num_workers
    )
    with tqdm(total=len(videos), unit="video", desc=what, disable=None) as progress:
        for batch in loader:
            progress.update(len(batch))
            failures += [video.failure for video in batch if video.failure is not None]
            readable = {video.index: video.views for video in batch if video.views is not None}
            if readable:
                features = encoder(
                    torch.cat([views.to(encoder.device).clips() for views in readable.values()])
                )
                index = list(readable)
                seen_M[index] = True
                pooled_MVD[index] = features.pooled_BD.unflatten(0, (-1, shape[1])).cpu()
                if tokens_MVND is not None:
                    tokens_MVND[index] = (
                        features.tokens_BND.unflatten(0, (-1, shape[1])).half().cpu()
                    )
    return FeatureSet(pooled_MVD, tokens_MVND, torch.tensor(videos.labels), seen_M, tuple(failures))
