"""What is predicted where targets are features: a frozen network sees the whole clip, and its
tokens are brought to the grid of the student.

Letters: B clips, T frames, H W pixels, C channels, t h w times, rows and columns of the tokens of a
teacher, N tokens of the student's grid in raster order, F features.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from torch import nn

from video_mae.config import PretrainConfig
from video_mae.config.schema import require
from video_mae.convert.model_folder import find_model_folder, is_model_folder, load_pretrained
from video_mae.extras import require_package
from video_mae.kernels.reference import pixel_range
from video_mae.model.masking import Grid
from video_mae.model.vit import Encoder
from video_mae.training.engine import Engine

# Of transformers: those whose tokens of patches come last, in raster order.
IMAGE_MODELS = (
    "clip_vision_model",
    "siglip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit_mae",
)
VIDEO_MODELS = ("videomae",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_teacher(config: PretrainConfig) -> "Teacher":
    """The teacher that objective.teacher names, on the CPU, which computes in engine.precision.

    Raises: FileNotFoundError; ValueError naming the key, also where it cannot take the clips of the
    run.
    """
    name, model = config.objective.teacher, config.model
    dtype = DTYPES[config.engine.precision]
    if name == "ema":
        encoder = Encoder(model, impl=config.engine.kernels, final_norm=model.encoder_norm)
        return MovingTeacher(encoder, model.grid, dtype, config.objective.teacher_momentum)
    folder = find_model_folder(name, "objective.teacher: ")
    # what lies here without hf: before it has always been read by ourselves
    if (name.startswith("hf:") or not Path(name).exists()) and not is_model_folder(folder):
        return TransformersTeacher(str(folder), config, dtype)
    source = load_pretrained(folder, impl=config.engine.kernels)
    theirs = source.config
    _require_same(str(folder), "model.in_channels", theirs.in_channels, model.in_channels)
    _require_frames(config, theirs.tubelet_size)
    return EncoderTeacher(source.encoder, model.grid, dtype)


class Teacher(nn.Module, ABC):
    """`teacher(clip_BTHWC)`: the targets of all tokens of a clip, without gradients.

    Frames are resized to the teacher's own size (bilinear, antialiased; another shape is
    stretched). Its tokens go to the student's grid in space, then in time: linear where they become
    more, averages (antialiased) where they become fewer. Last, each token is normalised over its
    features, without parameters. It stands outside the engine: neither partitioned nor saved.
    """

    frame_step = 1
    """Frames from one that it sees to the next."""
    network: Any

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int],
        width: int,
        grid: Grid,
        dtype: torch.dtype,
    ) -> None:
        """size: (height, width) of the frames it takes; width: F; grid: the student's; dtype: what
        it computes in.
        """
        super().__init__()
        self.network = network.to(dtype).eval().requires_grad_(False)
        self.size, self.width, self.grid = size, width, grid

    @abstractmethod
    def tokens(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
        """Tokens [B, t, h, w, F] of patches alone; the clip has the teacher's size, and is uint8 or
        floating point in [0, 1].
        """

    @torch.no_grad()
    def forward(self, clip_BTHWC: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Targets [B, N, F] in the dtype of the network; clip_BTHWC: uint8; grid: of the clip for
        the student, where it is not the one that was given at first.
        """
        clip_BTHWC = clip_BTHWC[:, :: self.frame_step]
        if clip_BTHWC.shape[2:4] != self.size:
            frames = rearrange(_unit(clip_BTHWC), "b t h w c -> (b t) c h w")
            frames = _interpolated(frames, self.size)
            clip_BTHWC = rearrange(frames, "(b t) c h w -> b t h w c", b=len(clip_BTHWC))
        tokens_BthwF = self.tokens(clip_BTHWC)
        targets_BNF = F.layer_norm(on_grid(tokens_BthwF, grid or self.grid), (self.width,))
        return targets_BNF.to(tokens_BthwF.dtype)


class EncoderTeacher(Teacher):
    """An encoder of ours: its tokens as it gives them, without class tokens (SALT, Li et al.,
    2025).
    """

    def __init__(self, encoder: Encoder, grid: Grid, dtype: torch.dtype = torch.float32) -> None:
        """encoder: is changed, to `dtype` and to evaluation without gradients; grid: the
        student's.
        """
        c = encoder.config
        super().__init__(encoder, (c.height, c.width), c.embed_dim, grid, dtype)

    def tokens(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
        tokens_BSF = self.network(clip_BTHWC)[:, self.network.config.class_tokens :]
        return tokens_BSF.unflatten(1, self.network.grid_of(clip_BTHWC))


class MovingTeacher(EncoderTeacher):
    """A moving average of the student's encoder: m * average + (1 - m) * weights after every step,
    m from `momentum` in a line to 1 at the end of the run.

    The averages are float32, of the weights that the student computes with, whole on every rank:
    with the copy that computes, 6 bytes a weight in bf16. In ZeRO 3 the encoder is gathered once a
    step. Source: I-JEPA (Assran et al., 2023) and V-JEPA (Bardes et al., 2024), after BYOL (Grill
    et al., 2020).
    """

    def __init__(self, encoder: Encoder, grid: Grid, dtype: torch.dtype, momentum: float) -> None:
        """encoder: one like the student, whose own weights do not matter."""
        super().__init__(encoder, grid, dtype)
        self.momentum = momentum
        self.averages: dict[str, torch.Tensor] = {}

    def start(self, engine: Engine, student: Encoder) -> None:
        """Becomes what the student is; every rank must call it."""
        with engine.whole(student.parameters()):
            for name, weight in student.named_parameters():
                self.averages[f"teacher.{name}"] = weight.detach().float().clone()

    @torch.no_grad()
    def follow(self, engine: Engine, student: Encoder, progress: float) -> None:
        """Takes in the weights after a step, before which `progress` of the run was done; every
        rank must call it.
        """
        weight = (1 - self.momentum) * (1 - progress)
        with engine.whole(student.parameters()):
            weights = [parameter.float() for parameter in student.parameters()]
            torch._foreach_lerp_(list(self.averages.values()), weights, weight)

    def tokens(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
        # only now, as a resumed run has averages that `follow` did not make
        torch._foreach_copy_(list(self.network.parameters()), list(self.averages.values()))
        return super().tokens(clip_BTHWC)


class TransformersTeacher(Teacher):
    """A model of Hugging Face transformers: the last hidden state of its patches, of images or of
    video.

    One of images sees the first frame of every tubelet: a token of features at each time of the
    student, of one moment and not the mean of several. Mean, deviation and size of an image are
    those of its preprocessor_config.json. Class and register tokens are left out.
    """

    def __init__(self, name: str, config: PretrainConfig, dtype: torch.dtype) -> None:
        """name: a folder, of the hub's cache for instance.

        Raises: ValueError naming the key.
        """
        model = config.model
        require_package("transformers", "objective.teacher")
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # it reports the decoder that it leaves out
        try:
            network, told = AutoModel.from_pretrained(name, output_loading_info=True)
            processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
            mean, std = processor["image_mean"], processor["image_std"]
            size = _pair(processor.get("crop_size") or processor["size"])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"objective.teacher: hf:{name} is not a model with weights, config.json and "
                f"preprocessor_config.json ({reason})"
            ) from None
        network = getattr(network, "vision_model", network)  # beside one of texts
        c = network.config
        known, missing = IMAGE_MODELS + VIDEO_MODELS, sorted(told["missing_keys"])
        remedy = f"is of type {c.model_type} and lacks {missing[:3]}; known are {', '.join(known)}"
        is_known = c.model_type in known and not missing
        require(is_known, "objective.teacher", f"hf:{name}", remedy)
        self.is_video = c.model_type in VIDEO_MODELS
        if self.is_video:
            size = _pair(c.image_size)
        super().__init__(network, size, c.hidden_size, model.grid, dtype)
        _require_same(f"hf:{name}", "model.in_channels", c.num_channels, model.in_channels)
        self.times = 1  # of a forward pass
        if self.is_video:
            _require_frames(config, c.num_frames, alone=True)
            self.times = c.num_frames // c.tubelet_size
        else:
            self.frame_step = model.tubelet_size
        patch_height, patch_width = _pair(c.patch_size)
        self.place = size[0] // patch_height, size[1] // patch_width
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def tokens(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
        pixels = rearrange(_unit(clip_BTHWC), "b t h w c -> b t c h w")
        pixels = ((pixels - self.mean) / self.std).to(self.network.dtype)
        options, kind, num_places = {}, self.network.config.model_type, math.prod(self.place)
        if not self.is_video:
            pixels = pixels.flatten(0, 1)
            if not kind.startswith("dino"):  # which do it by themselves
                options["interpolate_pos_encoding"] = True
        if kind == "vit_mae":
            # It would hide and shuffle patches.
            self.network.config.mask_ratio = 0.0
            order = torch.arange(num_places, device=pixels.device)
            options["noise"] = order.expand(len(pixels), -1)
        states = self.network(pixel_values=pixels, **options).last_hidden_state
        patches = states[:, -self.times * num_places :]
        return patches.reshape(len(clip_BTHWC), -1, *self.place, self.width)


def on_grid(tokens_BthwF: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens [B, N, F] of another grid, in float32: interpolated in space, then in time."""
    times, rows, columns = grid
    maps = rearrange(tokens_BthwF.float(), "b t h w f -> (b t) f h w")
    maps = _interpolated(maps, (rows, columns))
    maps = rearrange(maps, "(b t) f h w -> b f t (h w)", t=tokens_BthwF.shape[1])
    maps = _interpolated(maps, (times, rows * columns))
    return rearrange(maps, "b f t l -> b (t l) f")


def _interpolated(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", antialias=True)


def _unit(clip_BTHWC: torch.Tensor) -> torch.Tensor:
    """Floating point pixels in [0, 1]."""
    return clip_BTHWC.float() / pixel_range(clip_BTHWC.dtype)


def _pair(side: Any) -> tuple[int, int]:
    """(height, width) of a number that stands for both, a pair, or a dictionary of one or both."""
    if isinstance(side, dict):
        side = list(side.values())
    sides = [side] if isinstance(side, int) else side
    return sides[0], sides[-1]


def _require_same(teacher: str, key: str, theirs: int, ours: int) -> None:
    remedy = f"has {key} = {theirs}, this run {ours}"
    require(theirs == ours, "objective.teacher", teacher, remedy)


def _require_frames(config: PretrainConfig, unit: int, *, alone: bool = False) -> None:
    """A teacher takes clips of multiples of `unit` frames, or `alone` of so many; those of all
    stages are to be.
    """
    remedy = f"is not what objective.teacher takes: {unit if alone else f'multiples of {unit}'}"
    clips = {f"stages.{name}": stage for name, stage in config.stages.items()}
    for where, of in {"model": config.model, **clips}.items():
        num = of.num_frames or unit  # a stage may leave it to the model
        is_taken = num == unit or (not alone and num % unit == 0)
        require(is_taken, f"{where}.num_frames", num, remedy)
