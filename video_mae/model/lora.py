"""Fine-tuning that fits a small GPU: blocks that stay as they are, and low-rank updates of matrices
that do.

Letters: B clips, S tokens of a sequence, I O width that comes in and goes out, R rank, Q matrices
that are packed in one.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from video_mae.config import LoraConfig, ModelConfig
from video_mae.model.blocks import Block
from video_mae.model.vit import VideoClassifier, encoder_macs


class LowRankUpdate(nn.Module):
    """What a linear layer with a frozen weight is to put out besides: (alpha / rank) * up @ down @
    x, for each of the `packed` matrices that its weight holds.

    `down` starts at random, `up` at zero: the model starts as it was. Source: LoRA (Hu et al.,
    2021), whose A and B they are.
    """

    def __init__(self, weight_OI: torch.Tensor, packed: int, rank: int, alpha: float) -> None:
        super().__init__()
        out_width, in_width = weight_OI.shape
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(packed * rank, in_width))
        self.up = nn.Parameter(torch.zeros(packed, out_width // packed, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as a linear layer's weight

    def forward(self, x_BSI: torch.Tensor) -> torch.Tensor:
        # the blocks off the diagonal are few zeros: one product is less work than Q and a copy
        up = self.scale * torch.block_diag(*self.up)
        return F.linear(F.linear(x_BSI, self.down), up)


def choose_trained(model: VideoClassifier, freeze_blocks: int, lora: LoraConfig) -> None:
    """Freezes the first blocks of the encoder with all that comes before them, and gives the others
    low-rank updates in place of a training of their own where lora.rank is above 0.

    Norm and head after the blocks are always trained. Frozen blocks drop no paths: they put out
    what they do in inference, and no gradient is computed for them.
    """
    if not freeze_blocks and not lora.rank:
        return
    model.encoder.requires_grad_(False)
    model.encoder.norm.requires_grad_(True)
    for i, block in enumerate(model.encoder.blocks):
        assert isinstance(block, Block)
        if i < freeze_blocks:
            block.drop_path = nn.Identity()
        elif lora.rank:
            _add_updates(block, lora)
        else:
            block.requires_grad_(True)


def _add_updates(block: Block, lora: LoraConfig) -> None:
    layers: list[tuple[nn.Module, int]] = [(block.attn.qkv, 3), (block.attn.proj, 1)]
    if lora.targets == "attention_mlp":
        layers += [(block.mlp[0], 1), (block.mlp[2], 1)]
    for layer, packed in layers:
        weight_OI = layer.get_parameter("weight")
        layer.lora = LowRankUpdate(weight_OI, packed, lora.rank, lora.alpha)
        # not a layer around it: the names of the weights stay those of any other model
        layer.register_forward_hook(_add_update)


def _add_update(
    layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    return output + layer.get_submodule("lora")(inputs[0])


def merged(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model, by the names and with the values that they have where there are no
    low-rank updates: each is part of its matrix.
    """
    plain = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, LowRankUpdate):
            # rounded once
            down, up = (plain.pop(f"{name}.{factor}").double() for factor in ("down", "up"))
            update_OI = module.scale * torch.block_diag(*up) @ down
            key = f"{name.removesuffix('lora')}weight"
            plain[key] = (plain[key].double() + update_OI).to(plain[key].dtype)
    return plain


def trained_macs(config: ModelConfig, freeze_blocks: int, lora_rank: int) -> float:
    """A third of the multiply-accumulates of a clip's training step: those of its forward pass
    where all is trained.

    Frozen blocks have no backward pass; frozen matrices before a trained one have half of it, that
    to their input. What the factors themselves cost is left out.
    """
    c, macs = config, encoder_macs(config, config.num_tokens)
    if not freeze_blocks and not lora_rank:
        return macs
    num_seen = c.class_tokens + c.num_tokens
    attention = 2 * num_seen**2 * c.embed_dim  # has no matrices of its own
    block = (macs - c.num_tokens * c.tubelet_values * c.embed_dim) / c.depth
    backward = block + attention if lora_rank else 2 * block
    return (macs + (c.depth - freeze_blocks) * backward) / 3
