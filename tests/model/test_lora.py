"""Which parameters of a classifier train: frozen blocks, and low-rank updates of frozen matrices."""

from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from video_mae import ClassifierConfig, ModelConfig, VideoClassifier
from video_mae.config import LoraConfig
from video_mae.model.lora import LowRankUpdate, choose_trained, merged

# Odd on purpose: 2 x 3 x 5 tokens, widths that no two layers share.
CONFIG = ModelConfig(
    num_frames=4,
    height=24,
    width=40,
    patch_size=8,
    embed_dim=36,
    depth=3,
    num_heads=3,
    mlp_ratio=2.5,
)
LORA = LoraConfig(rank=5, alpha=7.0, targets="attention_mlp")
ATTENTION = LoraConfig(rank=2)


def make(
    config: ModelConfig = CONFIG,
    freeze_blocks: int = 0,
    lora: LoraConfig = LORA,
    *,
    is_trained: bool = False,
    checkpointing: bool = False,
    pooling: Literal["mean", "first"] = "mean",
) -> VideoClassifier:
    """is_trained: with updates that are not zero any more."""
    torch.manual_seed(3)
    head = ClassifierConfig(num_classes=7, head_init_scale=1.0, pooling=pooling)
    model = VideoClassifier(config, head, checkpointing=checkpointing)
    choose_trained(model, freeze_blocks, lora)
    for module in model.modules():
        if is_trained and isinstance(module, LowRankUpdate):
            torch.nn.init.normal_(module.up)
    return model


def blocks(model: VideoClassifier) -> list[Any]:
    return list(model.encoder.blocks)


def plain() -> VideoClassifier:
    return make(lora=LoraConfig())


def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 4, 24, 40, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LORA, ATTENTION])
def test_a_model_starts_as_it_was_without_updates(dtype: torch.dtype, lora: LoraConfig) -> None:
    assert torch.equal(make(lora=lora).to(dtype)(clips()), plain().to(dtype)(clips()))


def test_an_update_is_that_of_the_paper_for_query_key_and_value_apart() -> None:
    model, twin = make(is_trained=True).double(), plain().double()
    for ours, theirs in zip(blocks(model), blocks(twin), strict=True):
        qkv = ours.attn.qkv.lora
        assert qkv.down.shape == (3 * 5, 36)
        for i in range(3):  # W + alpha / r * B A, Hu et al., 2021, section 4.1
            change = 7.0 / 5 * qkv.up[i] @ qkv.down[5 * i : 5 * i + 5]
            theirs.attn.qkv.weight.data[36 * i : 36 * i + 36] += change
        for one, other in (
            (ours.attn.proj, theirs.attn.proj),
            (ours.mlp[0], theirs.mlp[0]),
            (ours.mlp[2], theirs.mlp[2]),
        ):
            other.weight.data += 7.0 / 5 * one.lora.up[0] @ one.lora.down
    difference = (model(clips()) - twin(clips())).abs().max()
    assert difference < 1e-12 < 1e-3 < (model(clips()) - plain().double()(clips())).abs().max()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("lora", "num_changed"), [(ATTENTION, 2 * 2), (LORA, 4 * 2)])
def test_merged_weights_are_those_of_a_plain_model_with_the_same_logits(
    dtype: torch.dtype, most: float, lora: LoraConfig, num_changed: int
) -> None:
    model = make(freeze_blocks=1, lora=lora, is_trained=True)
    model, twin = model.to(dtype), plain().to(dtype)
    before, state = twin.state_dict(), merged(model, model.state_dict())
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert len(changed) == num_changed
    twin.load_state_dict(state)
    ours, theirs = model(clips()), twin(clips())
    assert torch.allclose(ours, theirs, rtol=0, atol=most * theirs.abs().max().item())


def test_merging_a_plain_model_changes_nothing() -> None:
    state = plain().state_dict()
    assert all(merged(plain(), state)[name] is state[name] for name in state)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rank", "freeze_blocks"), [(0, 1), (0, 3), (4, 0), (4, 2)])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_gradients_reach_what_is_trained_and_nothing_else(
    checkpointing: bool, rank: int, freeze_blocks: int, pooling: Literal["mean", "first"]
) -> None:
    model = make(
        replace(CONFIG, positions="learned", class_tokens=1, layer_scale=0.1),
        freeze_blocks,
        LoraConfig(rank=rank),
        is_trained=True,
        checkpointing=checkpointing,
        pooling=pooling,
    )
    model(clips()).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    norm = "fc_norm" if pooling == "mean" else "encoder.norm"
    expected = {f"{part}.{kind}" for part, kind in product([norm, "head"], ["weight", "bias"])}
    for name, _ in model.named_parameters():
        is_later = name.startswith(tuple(f"encoder.blocks.{i}." for i in range(freeze_blocks, 3)))
        if is_later and (rank == 0 or ".lora." in name):
            expected.add(name)
    assert reached == expected
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_frozen_blocks_drop_no_paths_and_the_others_do() -> None:
    model, lasts = make(replace(CONFIG, drop_path=0.9), 2, LoraConfig()).train(), []
    model.encoder.blocks[1].register_forward_hook(lambda *call: lasts.append(call[2]))
    model.encoder.blocks[2].register_forward_hook(lambda *call: lasts.append(call[2]))
    for _ in range(2):
        model(clips())
    model.eval()(clips())
    assert torch.equal(lasts[0], lasts[2])
    assert torch.equal(lasts[0], lasts[4])
    assert not torch.equal(lasts[1], lasts[3])


def saved_bytes(freeze_blocks: int, lora: LoraConfig) -> int:
    """What the forward pass keeps for the backward pass, weights left out."""
    model = make(freeze_blocks=freeze_blocks, lora=lora)
    weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(clips()).sum()
    return sum(sizes.values())


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_is_kept_of_blocks_before_the_first_trained_one(rank: int) -> None:
    three, two, one = (saved_bytes(number, LoraConfig(rank=rank)) for number in range(3))
    none = saved_bytes(3, LoraConfig())
    assert none < 3 * (2 * 36 + 10) * 4  # fc_norm and head of 3 clips
    assert three > two > one > 20 * none
    assert two - one == pytest.approx(one - none, rel=0.15)  # a block is about as much as another
