"""What is trained to read the features of a frozen encoder: a linear head, an attentive head; and
many heads trained as one.

B examples, N tokens, D features, H attention heads, G heads trained side by side, K classes.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.func import functional_call

NORM_EPS = 1e-6
MLP_RATIO = 4


class LinearHead(nn.Module):
    """A linear layer on mean-pooled features, after a batch norm without parameters (`prepare`).
    Source: MAE's linear probe.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        # What comes before the head, the same for every head of a grid: in training with the
        # batch's statistics, else with their mean so far. The mean of all and not a moving one:
        # that would still remember its start, variance 1, after the few steps of a small list.
        self.prepare = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS, momentum=None)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of what is prepared."""
        return self.head(x_BD)


class AttentiveHead(nn.Module):
    """One learned query attends to all tokens; attention and MLP as in a transformer block, then a
    linear layer.

    Source: the attentive probe of V-JEPA (Bardes et al., 2024). A query that is the same for all
    clips needs no keys or values of the tokens themselves: it is brought to the tokens' side of the
    key matrix, and the value matrix is applied to the attended mean. That is the same function for
    a small part of the work, and what is left of the tokens is shared by all heads of a grid.
    """

    def __init__(self, width: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # what comes before the head: the part of the tokens' norm that has no parameters
        self.prepare = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.query_D = nn.Parameter(torch.empty(width))
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)  # it would move all scores of the query alike
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        hidden = MLP_RATIO * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of what is prepared."""
        H, scale, shift = self.num_heads, self.norm1.weight, self.norm1.bias
        q_Hd = rearrange(self.q(self.query_D), "(H d) -> H d", H=H)
        # `shift` would move all scores of the query alike
        key_HDd = rearrange(self.k.weight, "(H d) D -> H D d", H=H)
        seeker_HD = torch.einsum("hxd,hd->hx", key_HDd, q_Hd) * scale / math.sqrt(q_Hd.shape[1])
        weight_BHN = torch.einsum("bnx,hx->bhn", x_BND, seeker_HD).softmax(dim=2)
        # weights sum to 1
        mean_BHD = torch.einsum("bhn,bnx->bhx", weight_BHN, x_BND) * scale + shift
        value_HdD = rearrange(self.v.weight, "(H d) D -> H d D", H=H)
        value_BD = torch.einsum("hdx,bhx->bhd", value_HdD, mean_BHD).flatten(1) + self.v.bias
        y_BD = self.query_D + self.proj(value_BD)
        return self.head(y_BD + self.mlp(self.norm2(y_BD)))


class Setting(NamedTuple):
    """How one head of a grid is trained."""

    lr: float
    weight_decay: float


class HeadGrid(nn.Module):
    """G heads with the same start, each trained by AdamW at its own learning rate and weight decay,
    all on the same features at once.

    Each ends as it would alone: their losses are added, and none reads another's weights.
    """

    def __init__(
        self, make: Callable[[], LinearHead | AttentiveHead], settings: Sequence[Setting]
    ) -> None:
        super().__init__()
        first = make()
        self.settings = tuple(settings)
        self.prepare = first.prepare
        self.heads = nn.ModuleList(deepcopy(first) for _ in settings)
        self.optimizer = torch.optim.AdamW(
            {"params": list(head.parameters()), **setting._asdict()}
            for head, setting in zip(self.heads, settings, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [G, B, K] of features [B, D] or tokens [B, N, D]."""
        x, one = self.prepare(x), self.heads[0]
        stacked = {
            name: torch.stack([head.get_parameter(name) for head in self.heads])
            for name, _ in one.named_parameters()
        }
        return torch.vmap(lambda weights: functional_call(one, weights, (x,)))(stacked)

    def step(self, x: torch.Tensor, label_B: torch.Tensor, progress: float) -> None:
        """One update of every head; progress: the share of the training that is done, for a cosine
        to 0.
        """
        self.train()
        for group, setting in zip(self.optimizer.param_groups, self.settings, strict=True):
            group["lr"] = setting.lr * 0.5 * (1 + math.cos(math.pi * progress))
        logits_GBK = self(x)
        num_heads = len(self.settings)
        # the sum of the heads' means
        loss = F.cross_entropy(logits_GBK.flatten(0, 1), label_B.repeat(num_heads)) * num_heads
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [G, B, K], the batch norm with its running statistics."""
        self.eval()
        return self(x)
