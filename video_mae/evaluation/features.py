"""The features of a frozen encoder.

B clips, T frames, H W pixels, C channels, N patch tokens, S all tokens, D features, L chosen
blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from video_mae.config import ClipsConfig
from video_mae.config.training import Precision
from video_mae.convert.model_folder import Model
from video_mae.model.vit import VideoClassifier


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass in a precision."""
    return torch.autocast(
        device.type,
        torch.float16 if precision == "fp16" else torch.bfloat16,
        enabled=precision != "fp32",
    )


def clips_of(model: Model) -> ClipsConfig:
    """How the clips of a model's training were made, as it says; the defaults where it does not."""
    if isinstance(model, VideoClassifier):
        head = model.classifier_config
        sampling = "dense" if head.sampling == "dense" else "uniform"
        return ClipsConfig(sampling=sampling, stride=head.stride)
    return model.clips_config or ClipsConfig()


class Features(NamedTuple):
    """Of clips: patch tokens [B, N, D] in raster order (class tokens are left out), one vector each
    [B, D], and the tokens [B, L, N, D] that leave chosen blocks; float32.
    """

    tokens_BND: Tensor
    pooled_BD: Tensor
    pyramid_BLND: Tensor | None


class FrozenEncoder:
    """The encoder of a model on a device, without gradients, dropout or drop path.

    The tokens are those that the encoder gives, normed where it ends with a norm. The vector is
    what a classifier's head reads, and the mean of the tokens of a model without a head. layers:
    blocks (0 is the first) of the pyramid, whose tokens are those before the encoder's norm.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        precision: Precision = "fp32",
        layers: Sequence[int] = (),
    ) -> None:
        self.model, self.config = model.to(device).eval(), model.config
        self.device = device
        self.precision: Precision = precision
        self._blocks = [model.encoder.blocks[layer] for layer in layers]
        self._outputs: dict[nn.Module, Tensor] = {}
        for block in self._blocks:
            block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output_BSD: Tensor) -> None:
        self._outputs[block] = output_BSD[:, self.config.class_tokens :].float()

    @torch.no_grad()
    def __call__(self, clip_BTHWC: Tensor) -> Features:
        """clip_BTHWC: uint8, on any device."""
        model = self.model
        with autocast(self.device, self.precision):
            tokens_BSD = model.encoder(clip_BTHWC.to(self.device, non_blocking=True)).float()
            tokens_BND = tokens_BSD[:, self.config.class_tokens :]
            if isinstance(model, VideoClassifier):
                pooled_BD = model.pool(tokens_BSD)
            else:
                pooled_BD = tokens_BND.mean(dim=1)
        pyramid_BLND = None
        if self._blocks:
            pyramid_BLND = torch.stack([self._outputs[block] for block in self._blocks], dim=1)
        return Features(tokens_BND, pooled_BD.float(), pyramid_BLND)
