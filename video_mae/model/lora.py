"""Fine-tuning that fits a small GPU: blocks that stay as they are, and low-rank updates of matrices
that do.

Letters: B clips, S tokens of a sequence, I O width that comes in and goes out.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from video_mae.config import LoraConfig
from video_mae.model.blocks import PackedProjection
from video_mae.model.vit import VideoClassifier


class LowRankUpdate(nn.Module):
    """What a linear layer with a frozen weight puts out besides: (alpha / rank) * up @ down @ x;
    of queries, keys and values that are packed in one, each has factors of its own.

    It is a forward hook of its layer, not a layer around it: the names of the weights stay those of
    any other model. `down` starts at random, `up` at zero: the model starts as it was. Source: LoRA
    (Hu et al., 2021), whose A and B they are.
    """

    def __init__(self, layer: nn.Linear | PackedProjection, lora: LoraConfig) -> None:
        super().__init__()
        out_width, in_width = layer.weight.shape
        packed = 3 if isinstance(layer, PackedProjection) else 1
        self.scale = lora.alpha / lora.rank
        self.down = nn.Parameter(torch.empty(packed * lora.rank, in_width))
        self.up = nn.Parameter(torch.zeros(packed, out_width // packed, lora.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as a linear layer's weight

    def forward(
        self, layer: nn.Module, inputs: tuple[torch.Tensor], output_BSO: torch.Tensor
    ) -> torch.Tensor:
        """As a hook is called."""
        (x_BSI,) = inputs
        # what is off the diagonal is few zeros: less work than three products and a copy
        up = self.scale * torch.block_diag(*self.up)
        return output_BSO + F.linear(F.linear(x_BSI, self.down), up)


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
        if i < freeze_blocks:
            block.drop_path = nn.Identity()
        elif lora.rank:
            part = block.get_submodule("attn") if lora.targets == "attention" else block
            for layer in list(part.modules()):
                if isinstance(layer, nn.Linear | PackedProjection):
                    layer.lora = LowRankUpdate(layer, lora)
                    layer.register_forward_hook(layer.lora)
        else:
            block.requires_grad_(True)


def merged(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model, by the names and with the values that they have where there are no
    low-rank updates: each is part of its matrix.
    """
    plain = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, LowRankUpdate):
            key = name.removesuffix("lora") + "weight"
            weight, down, up = plain[key], plain.pop(f"{name}.down"), plain.pop(f"{name}.up")
            # rounded once
            update_OI = module.scale * torch.block_diag(*up.double()) @ down.double()
            plain[key] = (weight.double() + update_OI).to(weight.dtype)
    return plain
