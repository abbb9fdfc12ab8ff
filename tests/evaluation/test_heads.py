"""Heads on frozen features: against their definitions, each alone, and on signals that one finds
and another cannot.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from video_mae.evaluation.heads import (
    AttentiveHead,
    HeadGrid,
    LinearHead,
    Setting,
)

SETTINGS = [Setting(lr, decay) for lr in (1e-3, 3e-2) for decay in (0.0, 0.5)]


def accuracy(grid: HeadGrid, x: torch.Tensor, label_B: torch.Tensor) -> list[float]:
    return [float((logits.argmax(dim=1) == label_B).double().mean()) for logits in grid.logits(x)]


def train(grid: HeadGrid, x: torch.Tensor, label_B: torch.Tensor, steps: int = 60) -> HeadGrid:
    for step in range(steps):
        grid.step(x, label_B, step / steps)
    return grid


@pytest.fixture(autouse=True)
def _one_thread(quiet_process: None) -> None:
    torch.manual_seed(0)


def test_the_batch_norm_is_the_definition_without_parameters():
    grid = HeadGrid(lambda: LinearHead(3, 2), SETTINGS)
    assert list(grid.prepare.parameters()) == []
    batches = [
        torch.randn(7, 3) * torch.tensor([1.0, 20.0, 0.1]) + torch.tensor([0.0, 5.0, -9.0])
        for _ in range(2)
    ]
    for x_BD in batches:
        grid.step(x_BD, torch.tensor([0, 1, 1, 0, 1, 0, 0]), 0.0)
    first, x_BD = grid.heads[0], batches[0]
    assert isinstance(first, LinearHead)
    head = first.head
    mean_D = (batches[0].mean(dim=0) + batches[1].mean(dim=0)) / 2
    variance_D = (batches[0].var(dim=0, unbiased=True) + batches[1].var(dim=0, unbiased=True)) / 2
    torch.testing.assert_close(
        grid.logits(x_BD)[0], head((x_BD - mean_D) / (variance_D + 1e-6).sqrt())
    )
    grid.train()
    in_training = (x_BD - x_BD.mean(dim=0)) / (x_BD.var(dim=0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(grid(x_BD)[0], head(in_training))


def reference_attention(head: AttentiveHead, tokens_BND: torch.Tensor) -> torch.Tensor:
    """The cross-attention block as V-JEPA writes it: keys and values of every token, torch's
    attention.
    """
    x = F.layer_norm(tokens_BND, tokens_BND.shape[2:], head.norm1.weight, head.norm1.bias, 1e-6)
    query = head.query_D.expand(len(x), 1, -1)

    def split(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(2, (head.num_heads, -1)).transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        split(head.q(query)), split(head.k(x)), split(head.v(x))
    )
    y = query + head.proj(attended.transpose(1, 2).flatten(2))
    y = y + head.mlp(head.norm2(y))
    return head.head(y[:, 0])


def test_the_attentive_head_is_a_cross_attention_block():
    head = AttentiveHead(12, 5, num_heads=3)
    for parameter in head.parameters():
        parameter.data.normal_(std=0.5)
    tokens_BND = torch.randn(2, 7, 12) * 3 + 1
    logits = head(head.prepare(tokens_BND))
    expected = reference_attention(head, tokens_BND)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    weight_BK = torch.randn(2, 5)
    gradients = torch.autograd.grad(
        (logits * weight_BK).sum(), list(head.parameters()), retain_graph=True
    )
    for ours, theirs in zip(
        gradients,
        torch.autograd.grad((expected * weight_BK).sum(), list(head.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_each_head_of_a_grid_ends_as_it_would_alone(kind: str) -> None:
    shape = (24, 6) if kind == "linear" else (24, 5, 6)
    x, label_B = torch.randn(shape), torch.randint(3, (24,))

    def make() -> LinearHead | AttentiveHead:
        torch.manual_seed(1)
        return LinearHead(6, 3) if kind == "linear" else AttentiveHead(6, 3, num_heads=2)

    grid, steps = HeadGrid(make, SETTINGS), 12
    for step in range(steps):
        grid.step(x[step : step + 8], label_B[step : step + 8], step / steps)
    together = grid.logits(x)
    for place, setting in enumerate(SETTINGS):
        head = make()
        prepare = head.prepare
        optimizer = torch.optim.AdamW(
            head.parameters(), setting.lr, weight_decay=setting.weight_decay
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = (
                setting.lr * (1 + math.cos(math.pi * step / steps)) / 2
            )
            optimizer.zero_grad()
            F.cross_entropy(head(prepare(x[step : step + 8])), label_B[step : step + 8]).backward()
            optimizer.step()
        torch.testing.assert_close(together[place], head(prepare.eval()(x)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[-1], atol=1e-2)  # the settings do differ


def test_a_linear_head_finds_a_planted_direction():
    x_BD, label_B = torch.randn(200, 8), torch.randint(2, (200,))
    # small beside the noise: the batch norm sees to that
    x_BD[:, 3] = 0.01 * (2.0 * label_B - 1) + 0.001 * torch.randn(200)
    grid = train(HeadGrid(lambda: LinearHead(8, 2), SETTINGS), x_BD[:100], label_B[:100])
    assert max(accuracy(grid, x_BD[100:], label_B[100:])) == 1.0


def test_an_attentive_head_finds_what_the_mean_of_the_tokens_does_not_hold():
    def clips(num: int) -> tuple[torch.Tensor, torch.Tensor]:
        label_B = torch.randint(2, (num,))
        tokens_BND = 0.1 * torch.randn(num, 9, 8)
        signal_BD = 4.0 * F.one_hot(label_B, 8)  # +s and -s, in any two places: the mean is noise
        places = torch.rand(num, 9).argsort(dim=1)
        for clip in range(num):
            tokens_BND[clip, places[clip, 0]] += signal_BD[clip]
            tokens_BND[clip, places[clip, 1]] -= signal_BD[clip]
        return tokens_BND - tokens_BND.mean(dim=1, keepdim=True), label_B

    (train_x, train_label), (x, label) = clips(128), clips(128)
    attentive = train(
        HeadGrid(lambda: AttentiveHead(8, 2, num_heads=2), SETTINGS),
        train_x,
        train_label,
        steps=120,
    )
    linear = train(HeadGrid(lambda: LinearHead(8, 2), SETTINGS), train_x.mean(dim=1), train_label)
    assert max(accuracy(attentive, x, label)) > 0.95
    assert max(accuracy(linear, x.mean(dim=1), label)) < 0.7
