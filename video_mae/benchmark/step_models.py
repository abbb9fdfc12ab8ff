"""What is timed in `video-mae bench step`: our model and Hugging Face's VideoMAEForPreTraining with
our weights, each with AdamW, and the ways to take their training step.

Hugging Face's decoder and loss always take every hidden token: there is no dual masking.
Letters: B clips, T frames, H W pixels, C channels, N tokens, V visible, M masked.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from video_mae.benchmark.clock import Stopwatch
from video_mae.config import EngineConfig, ModelConfig, OptimConfig, RunConfig
from video_mae.convert.export import export_hugging_face
from video_mae.model.masking import TokenMask
from video_mae.model.vit import VideoMAE
from video_mae.training.engine import Engine
from video_mae.training.optim import make_optimizer

if TYPE_CHECKING:
    from transformers import VideoMAEForPreTraining

LR = 1e-5


class Trainer:
    """A model in its place and precision, and AdamW for it.

    bf16: weights, activations and gradients are bfloat16, the optimizer has a float32 master copy,
    as under DeepSpeed.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device = model.to(device), device
        self.weights, self.masters = _trainable(model), []
        optimized = model
        if dtype != torch.float32:
            optimized = copy.deepcopy(model)
            self.masters = _trainable(optimized)
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            model.to(dtype)
        self.optimizer: Any = make_optimizer(optimized, OptimConfig(base_lr=LR), fused=True)

    def backward(self, loss: Tensor) -> None:
        """Fills the gradients."""
        loss.backward()

    def update(self) -> None:
        """The optimizer's part of a step; the gradients are gone afterwards."""
        if self.masters:
            high = [master.grad for master in self.masters]
            low = [weight.grad for weight in self.weights]
            torch._foreach_copy_(high, low)
        self.optimizer.step()
        if self.masters:
            torch._foreach_copy_([weight.data for weight in self.weights], self.masters)
        self.model.zero_grad()


def _trainable(model: nn.Module) -> list[Any]:
    return [weight for weight in model.parameters() if weight.requires_grad]


class EngineTrainer:
    """The same as in training: a copy of the model under `Engine`, ZeRO 1 in one process."""

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, batch: int
    ) -> None:
        precision = "fp32" if dtype == torch.float32 else "bf16"
        config = RunConfig(
            output=".",  # nothing is written
            engine=EngineConfig(zero_stage=1, precision=precision),
            optim=OptimConfig(micro_batch=batch),
        )
        self.engine = Engine(copy.deepcopy(model), config)
        self.model, self.device = self.engine.deepspeed.module, device
        self.optimizer: Any = self.engine.optimizer

    def backward(self, loss: Tensor) -> None:
        """Fills the gradients."""
        self.engine.backward(loss, last=True)

    def update(self) -> None:
        """The optimizer's part of a step, and what the host reads of the step before."""
        self.engine.step(LR)
        self.engine.statuses.take(of_all=False)


def kept_bytes(trainer: Trainer | EngineTrainer) -> int:
    """What weights, master weights and optimizer state take between steps."""
    kept: list[Any] = [*trainer.model.parameters(), *trainer.model.buffers()]
    for weight, moments in trainer.optimizer.state.items():
        kept += [weight, weight.grad, *moments.values()]
    tensors = {id(tensor): tensor for tensor in kept if isinstance(tensor, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


class Step:
    """A training step as it is called: data copy, preparation of the input, forward, backward,
    optimizer.

    model: of the trainer, as it is called with a clip, which `prepare` may change on the device,
    and a mask.
    """

    def __init__(
        self,
        trainer: Trainer | EngineTrainer,
        clip: Tensor,
        model: Callable[..., Any],
        mask: Any,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.trainer, self._model, self._mask, self._prepare = trainer, model, mask, prepare
        self._clip = clip.pin_memory() if trainer.device.type == "cuda" else clip

    def __call__(self, lap: Callable[[str], None] = lambda part: None) -> None:
        """Takes a step; a lap ends each part of it but for those that `marked` ends."""
        clip = self._clip.to(self.trainer.device, non_blocking=True)
        lap("data copy")
        if self._prepare is not None:
            clip = self._prepare(clip)
            lap("preparation")
        self.trainer.backward(self._model(clip, self._mask).loss)
        lap("embed")  # which is what a backward pass ends with
        self.trainer.update()
        lap("optimizer")

    def parts(self) -> dict[str, float]:
        """Takes a step; milliseconds of its parts."""
        watch = Stopwatch(self.trainer.device.type == "cuda")
        with marked(borders_of(self.trainer.model), watch):
            self(watch.lap)
        return watch.parts()


# ---------------------------------------------------------------- where the time of a step goes


class Border(NamedTuple):
    """Between two parts: the first input of a module, or its output."""

    module: nn.Module
    side: str
    before: str
    after: str


# What a module's name ends with, and its border. Attention is the product of queries, keys and
# values alone: what the attention kernels compute. Its projections are in `rest`.
BORDERS = {
    "encoder.patch_embed": ("input", "gather", "embed"),
    "encoder.blocks.0": ("input", "embed", "encoder rest"),
    "attn.qkv": ("output", "{} rest", "{} attention"),
    "attn.proj": ("input", "{} attention", "{} rest"),
    "encoder_to_decoder": ("input", "encoder rest", "decoder rest"),
    "decoder.head": ("output", "decoder rest", "losses"),
    # Hugging Face's names; the query comes after key and value
    "encoder.layer.0": ("input", "embed", "encoder rest"),
    "attention.attention.query": ("output", "{} rest", "{} attention"),
    "attention.output.dense": ("input", "{} attention", "{} rest"),
}


def borders_of(model: nn.Module) -> list[Border]:
    """Between the parts of our model or of Hugging Face's."""
    found: list[Border] = []
    for name, module in model.named_modules():
        level = "decoder" if name.startswith("decoder") else "encoder"
        for end, (side, before, after) in BORDERS.items():
            if name.endswith(end):
                found.append(Border(module, side, before.format(level), after.format(level)))
    return found


@contextmanager
def marked(borders: Sequence[Border], watch: Stopwatch) -> Iterator[None]:
    """Within it a lap ends where a tensor, or later its gradient, crosses one of the borders.

    A mark is an identity whose forward and backward take the time. What lies between two marks
    belongs to one part, so the parts of a step add up to all of it, and what they add is the marks
    themselves: a few microseconds each.
    """

    def watched(border: Border) -> Any:
        if border.side == "output":
            return border.module.register_forward_hook(
                lambda module, inputs, output: _Mark.apply(output, watch, border)
            )
        return border.module.register_forward_pre_hook(
            lambda module, inputs: (_Mark.apply(inputs[0], watch, border), *inputs[1:])
        )

    handles = [watched(border) for border in borders]
    yield
    for handle in handles:
        handle.remove()


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: Stopwatch, border: Border) -> Tensor:
        ctx.watch, ctx.border = watch, border
        watch.lap(border.before)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        ctx.watch.lap(ctx.border.after)
        return gradients[0], None, None


# ---------------------------------------------------------------- Hugging Face's model


def hugging_face_model(model: VideoMAE) -> "VideoMAEForPreTraining":
    """Their model with the architecture, weights and epsilons of ours, attention by SDPA, in
    training mode.

    Raises: ImportError without transformers; ValueError for a model of ours that theirs cannot be.
    """
    from transformers import VideoMAEForPreTraining
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as workshop:
        folder = Path(workshop) / "model"
        export_hugging_face(model, folder)
        theirs: VideoMAEForPreTraining = VideoMAEForPreTraining.from_pretrained(
            folder, attn_implementation="sdpa"
        )
    # the one epsilon that their configuration leaves out
    theirs.decoder.norm.eps = model.config.head_norm_eps
    return theirs.train()


def prepare(clip_BTHWC: Tensor, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
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


def boolean_mask(mask: TokenMask, num_tokens: int) -> Tensor:
    """Their mask [B, N]: True where a token is hidden. The mask must predict everything that it
    hides.
    """
    visible_BV = mask.visible_BV
    hidden_BN = visible_BV.new_ones(len(visible_BV), num_tokens, dtype=torch.bool)
    return hidden_BN.scatter(1, visible_BV, False)
