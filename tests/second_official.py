"""Files as other projects write them, and what their models compute from them: from the description
of their state dicts alone.

Nothing is shared with `video_mae`. Every weight and bias is random, none is 0 or 1. The forward
passes are those of second_implementation.py on the names of the file. Letters: D E widths, H G MLP
widths, C channels, t p tubelet, N tokens, K classes.
"""

import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

second = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("second_implementation.py")))
)
State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A small model of odd shape; frames, height and width are of the clip."""

    frames: int = 6
    height: int = 16
    width: int = 24
    tubelet: int = 2
    patch: int = 8
    channels: int = 3
    embed: int = 24
    depth: int = 3
    heads: int = 3
    hidden: int = 40
    decoder_embed: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 2
    decoder_hidden: int = 24
    classes: int = 5

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames // self.tubelet, self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Maker:
    """Random tensors under names: layer norms near 1, all else near 0."""

    def __init__(self, seed: int) -> None:
        self.generator, self.state = torch.Generator().manual_seed(seed), {}

    def tensor(self, name: str, *shape: int, around: float = 0.0, scale: float = 0.05) -> None:
        self.state[name] = around + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, outputs: int, *inputs: int, bias: bool = True) -> None:
        self.tensor(f"{name}.weight", outputs, *inputs)
        if bias:
            self.tensor(f"{name}.bias", outputs)

    def norm(self, name: str, width: int) -> None:
        self.tensor(f"{name}.weight", width, around=1.0)
        self.tensor(f"{name}.bias", width)

    def block(
        self,
        name: str,
        width: int,
        hidden: int,
        attention: str,
        layer_scale: bool = False,
        mlp: tuple[str, str] = ("fc1", "fc2"),
    ) -> None:
        """attention: "q_bias" (VideoMAE), "packed" (MAE), "apart" (mae_st) or "none" (without
        biases).
        """
        self.norm(f"{name}.norm1", width)
        self.norm(f"{name}.norm2", width)
        if attention == "apart":
            for part in "qkv":
                self.linear(f"{name}.attn.{part}", width, width)
        else:
            self.linear(f"{name}.attn.qkv", 3 * width, width, bias=attention == "packed")
        if attention == "q_bias":
            self.tensor(f"{name}.attn.q_bias", width)
            self.tensor(f"{name}.attn.v_bias", width)
        self.linear(f"{name}.attn.proj", width, width)
        self.linear(f"{name}.mlp.{mlp[0]}", hidden, width)
        self.linear(f"{name}.mlp.{mlp[1]}", width, hidden)
        if layer_scale:
            self.tensor(f"{name}.gamma_1", width)
            self.tensor(f"{name}.gamma_2", width)


def videomae_pretraining(
    size: Size,
    seed: int = 0,
    *,
    attention: str = "q_bias",
    layer_scale: bool = False,
    image: bool = False,
) -> State:
    """VideoMAE and VideoMAE V2; with `image` MAE-pytorch, which embeds by a Conv2d."""
    make = Maker(seed)
    make.linear(
        "encoder.patch_embed.proj",
        size.embed,
        size.channels,
        *([] if image else [size.tubelet]),
        size.patch,
        size.patch,
    )
    for i in range(size.depth):
        make.block(f"encoder.blocks.{i}", size.embed, size.hidden, attention, layer_scale)
    make.norm("encoder.norm", size.embed)
    make.linear("encoder_to_decoder", size.decoder_embed, size.embed, bias=False)
    make.tensor("mask_token", 1, 1, size.decoder_embed)
    for i in range(size.decoder_depth):
        make.block(
            f"decoder.blocks.{i}", size.decoder_embed, size.decoder_hidden, attention, layer_scale
        )
    make.norm("decoder.norm", size.decoder_embed)
    make.linear(
        "decoder.head",
        (1 if image else size.tubelet) * size.patch**2 * size.channels,
        size.decoder_embed,
    )
    return make.state


def videomae_finetuned(
    size: Size, seed: int = 0, *, attention: str = "q_bias", pooling: str = "mean"
) -> State:
    """VideoMAE, fine-tuned: no prefix; `fc_norm` after the mean, or `norm` before the first token
    is taken.
    """
    make = Maker(seed)
    make.linear("patch_embed.proj", size.embed, size.channels, size.tubelet, size.patch, size.patch)
    for i in range(size.depth):
        make.block(f"blocks.{i}", size.embed, size.hidden, attention)
    make.norm("fc_norm" if pooling == "mean" else "norm", size.embed)
    make.linear("head", size.classes, size.embed)
    return make.state


def mmaction_finetuned(size: Size, seed: int = 0) -> State:
    """mmaction2: other words, and the table of positions as a buffer."""
    make = Maker(seed)
    make.linear(
        "backbone.patch_embed.projection",
        size.embed,
        size.channels,
        size.tubelet,
        size.patch,
        size.patch,
    )
    for i in range(size.depth):
        make.block(
            f"backbone.blocks.{i}",
            size.embed,
            size.hidden,
            "q_bias",
            mlp=("layers.0.0", "layers.1"),
        )
    make.norm("backbone.fc_norm", size.embed)
    make.linear("cls_head.fc_cls", size.classes, size.embed)
    return {
        "backbone.pos_embed": second.sinusoid_table(size.tokens, size.embed)[None],
        **make.state,
    }


def mae(
    size: Size,
    seed: int = 0,
    *,
    part: str = "all",
    fixed_positions: bool = True,
    pooling: str = "mean",
) -> State:
    """Image MAE: `part` is all, encoder (as released) or classifier. Fixed positions are float32 of
    the published formula.
    """
    make = Maker(seed)
    make.tensor("cls_token", 1, 1, size.embed)
    make.linear("patch_embed.proj", size.embed, size.channels, size.patch, size.patch)
    sides = [("pos_embed", size.embed)] + (
        [("decoder_pos_embed", size.decoder_embed)] if part == "all" else []
    )
    for name, width in sides:
        make.tensor(name, 1, 1 + size.tokens, width)
        if fixed_positions:
            make.state[name] = torch.cat(
                [torch.zeros(1, width), second.place_table(size.grid, width)]
            )[None]
    for i in range(size.depth):
        make.block(f"blocks.{i}", size.embed, size.hidden, "packed")
    make.norm("fc_norm" if part == "classifier" and pooling == "mean" else "norm", size.embed)
    if part == "classifier":
        make.linear("head", size.classes, size.embed)
    if part == "all":
        _mae_decoder(make, size, "packed", size.patch**2 * size.channels)
    return make.state


def mae_st(
    size: Size,
    seed: int = 0,
    *,
    part: str = "all",
    separate: bool = True,
    class_token: bool = True,
    predicted: int = 1,
    norm: str = "fc_norm",
    head: str = "head",
) -> State:
    """mae_st: learned positions, together or apart for space and time; `predicted` frames of a
    tubelet come out of the decoder.
    """
    make = Maker(seed)
    time, places = size.grid[0], size.grid[1] * size.grid[2]
    make.linear("patch_embed.proj", size.embed, size.channels, size.tubelet, size.patch, size.patch)
    for under, width in (
        (("", size.embed), ("decoder_", size.decoder_embed))
        if part == "all"
        else (("", size.embed),)
    ):
        if class_token:
            make.tensor(f"{under}cls_token", 1, 1, width)
        if separate:
            make.tensor(f"{under}pos_embed_spatial", 1, places, width)
            make.tensor(f"{under}pos_embed_temporal", 1, time, width)
            if class_token:
                make.tensor(f"{under}pos_embed_class", 1, 1, width)
        else:
            make.tensor(f"{under}pos_embed", 1, int(class_token) + time * places, width)
    for i in range(size.depth):
        make.block(f"blocks.{i}", size.embed, size.hidden, "apart")
    make.norm("norm" if part == "all" else norm, size.embed)
    if part == "all":
        _mae_decoder(make, size, "apart", predicted * size.patch**2 * size.channels)
    else:
        make.linear(head, size.classes, size.embed)
    return make.state


def _mae_decoder(make: Maker, size: Size, attention: str, outputs: int) -> None:
    make.linear("decoder_embed", size.decoder_embed, size.embed)
    make.tensor("mask_token", 1, 1, size.decoder_embed)
    for i in range(size.decoder_depth):
        make.block(f"decoder_blocks.{i}", size.decoder_embed, size.decoder_hidden, attention)
    make.norm("decoder_norm", size.decoder_embed)
    make.linear("decoder_pred", outputs, size.decoder_embed)


def finetuned_forward(video_BCTHW: torch.Tensor, state: State, size: Size) -> torch.Tensor:
    """Logits of VideoMAE, fine-tuned, by the names of its file."""
    prefixed = {f"encoder.{name}": tensor for name, tensor in state.items()}
    x = second.blocks(second.embed(video_BCTHW, prefixed), state, "blocks", size.depth, size.heads)
    x = (
        second.norm(x.mean(1), state, "fc_norm")
        if "fc_norm.weight" in state
        else second.norm(x, state, "norm")[:, 0]
    )
    return F.linear(x, state["head.weight"], state["head.bias"])


def pretraining_forward(
    video_BCTHW: torch.Tensor, state: State, hidden_BN: torch.Tensor, size: Size
) -> torch.Tensor:
    """Predictions of VideoMAE; a Conv2d counts as a Conv3d over one frame."""
    key = "encoder.patch_embed.proj.weight"
    state = {**state, key: state[key] if state[key].dim() == 5 else state[key][:, :, None]}
    return second.pretraining_forward(
        video_BCTHW,
        state,
        hidden_BN,
        torch.ones_like(hidden_BN),
        (size.depth, size.decoder_depth),
        (size.heads, size.decoder_heads),
    )


def as_finetuned(state: State) -> State:
    """A file of mmaction2 in the official words."""
    words = (
        ("backbone.", ""),
        ("projection", "proj"),
        ("mlp.layers.0.0", "mlp.fc1"),
        ("mlp.layers.1", "mlp.fc2"),
        ("cls_head.fc_cls", "head"),
    )
    renamed = {}
    for name, tensor in state.items():
        for theirs, official in words:
            name = name.replace(theirs, official)
        renamed[name] = tensor
    return renamed
