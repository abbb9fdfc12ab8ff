"""Learning rates, parameter groups, and the guard that skips a step that is not finite."""

import copy
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from video_mae import ModelConfig, ObjectiveConfig, VideoClassifier, VideoMAE
from video_mae.config import OptimConfig
from video_mae.training.optim import (
    Schedule,
    guard,
    make_optimizer,
    make_schedule,
    parameter_groups,
    videos_of_epoch,
)

MODEL = ModelConfig(
    num_frames=4,
    height=16,
    width=16,
    embed_dim=12,
    depth=1,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)


@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 1), (0, 10), (1, 10), (4, 10), (10, 10), (40, 1600)]
)
def test_schedule_warms_up_linearly_and_ends_near_its_floor(warmup, total):
    schedule = Schedule(1e-3, 1e-5, warmup, total)
    rates = [schedule.lr(step) for step in range(total)]
    assert rates[:warmup] == pytest.approx([1e-3 * (step + 1) / warmup for step in range(warmup)])
    assert rates[min(warmup, total - 1)] == pytest.approx(1e-3)
    assert all(
        later <= earlier
        for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False)
    )
    assert min(rates[warmup:], default=1e-5) >= 1e-5
    assert schedule.lr(total) == pytest.approx(1e-5 if warmup < total else 1e-3)


def test_schedule_is_half_a_cosine():
    schedule = Schedule(1.0, 0.2, 10, 110)
    assert schedule.lr(60) == pytest.approx(0.6)
    assert schedule.lr(35) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert schedule.lr(10**9) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("warmup", "total", "cooldown"), [(3, 17, 5), (0, 4, 4), (2, 9, 0), (5, 6, 1), (1, 1, 0)]
)
def test_a_constant_rate_cools_down_by_one_minus_the_root(warmup, total, cooldown):
    schedule = Schedule(3e-3, 2e-4, warmup, total, cooldown)
    for step in range(total):
        rate = 3e-3
        if step < warmup:
            rate = 3e-3 * (step + 1) / warmup
        elif step > total - cooldown:  # its first step is still at the peak, as a cosine's is
            share = (step - (total - cooldown)) / cooldown
            rate = 2e-4 + (3e-3 - 2e-4) * (1 - share**0.5)
        assert schedule.lr(step) == pytest.approx(rate), step
    assert schedule.lr(max(warmup, total - cooldown - 1)) == 3e-3  # the very same before it begins


def test_the_line_tells_of_a_cooldown_in_steps_also_where_it_is_given_in_epochs():
    config = OptimConfig(
        schedule="constant_cooldown",
        epochs=10,
        warmup_epochs=1,
        cooldown_epochs=2.5,
        micro_batch=8,
        base_lr=0.32,
        min_lr=0.032,
    )
    schedule, line = make_schedule(config, 20, 1, 1)
    assert (schedule.warmup_steps, schedule.total_steps, schedule.cooldown_steps) == (2, 25, 6)
    assert line.endswith(
        "2 warm-up steps of 25, then constant, the last 6 a cooldown (1 - sqrt) to 0.001"
    )
    endless, line = make_schedule(OptimConfig(steps=9, schedule="constant_cooldown"), 32, 1, 1)
    assert endless.cooldown_steps == 0
    assert line.endswith("0 warm-up steps of 9, then constant, without a cooldown")
    cosine, line = make_schedule(OptimConfig(steps=25, warmup_steps=2), 20, 1, 1)
    assert cosine.cooldown_steps is None
    assert "2 warm-up steps of 25, then a cosine to " in line


# (base rate, ranks, micro-batch, published learning rate) of VideoMAE's and VideoMAE V2's
# pretraining scripts
PUBLISHED = [
    (3e-4, 8, 24, 2.25e-4),
    (1.5e-4, 64, 32, 1.2e-3),
    (1.5e-4, 32, 32, 6e-4),
    (1.5e-4, 64, 8, 3e-4),
    (6e-4, 64, 32, 4.8e-3),
]


@pytest.mark.parametrize(("base", "ranks", "micro_batch", "published"), PUBLISHED)
def test_learning_rate_follows_the_global_batch_as_published(base, ranks, micro_batch, published):
    config = OptimConfig(base_lr=base, micro_batch=micro_batch)
    schedule, line = make_schedule(config, 240_000, ranks, clips_per_video=4)
    assert schedule.peak_lr == pytest.approx(published)
    assert schedule.final_lr == pytest.approx(1e-5 * ranks * micro_batch / 256)
    assert f"{published:.4g} = {base:.4g} x global batch {ranks * micro_batch} / 256" in line
    assert "\n" not in line
    assert f"micro-batch {micro_batch} x {ranks} ranks x 1 accumulated;" in line


def test_clips_of_a_video_count_only_on_request():
    config = OptimConfig(micro_batch=4, accumulation=3)
    schedule, line = make_schedule(config, 10_000, 2, clips_per_video=4)
    counting, counting_line = make_schedule(
        replace(config, lr_counts_clips=True), 10_000, 2, clips_per_video=4
    )
    assert (schedule.peak_lr, counting.peak_lr) == pytest.approx(
        (1.5e-4 * 24 / 256, 1.5e-4 * 96 / 256)
    )
    assert "global batch 24 " in line
    assert "clips a video" not in line
    assert "global batch 96 " in counting_line
    assert "x 4 clips a video" in counting_line
    assert counting.total_steps == schedule.total_steps


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "videos", "batch", "steps", "warmup_steps"),
    [
        (800, 40, 9537, 192, 39737, 1986),
        (10, 1, 8, 8, 10, 1),
        (1.5, 0.5, 10, 4, 3, 1),
        (3, 0, 5, 15, 1, 0),
    ],
)
def test_epochs_become_steps_by_videos_seen(
    epochs, warmup_epochs, videos, batch, steps, warmup_steps
):
    config = OptimConfig(epochs=epochs, warmup_epochs=warmup_epochs, micro_batch=batch)
    schedule, _ = make_schedule(config, videos, 1, 1)
    assert (schedule.total_steps, schedule.warmup_steps) == (steps, warmup_steps)


def test_steps_win_over_epochs():
    schedule, line = make_schedule(OptimConfig(steps=100, warmup_steps=7), 50, 1, 1)
    assert (schedule.total_steps, schedule.warmup_steps) == (100, 7)
    assert "7 warm-up steps of 100" in line


def test_run_shorter_than_a_step_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"^optim\.epochs: .*optim\.global_batch") as error:
        make_schedule(OptimConfig(epochs=1, warmup_epochs=0, micro_batch=32), 8, 1, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("videos", "batch", "ranks", "epochs", "warmup_epochs", "ours", "theirs"),
    [
        (1000, 256, 1, 800, 40, (3125, 156), (2400, 120)),
        (9537, 24, 8, 3200, 40, (158_950, 1986), (156_800, 1960)),
        (1_281_167, 64, 64, 800, 40, (250_227, 12_511), (249_600, 12_480)),
        (1024, 256, 2, 1.5, 0.5, (3, 1), (3, 1)),
    ],
)
def test_whole_steps_an_epoch_make_the_steps_of_the_sources(
    videos, batch, ranks, epochs, warmup_epochs, ours, theirs
):
    config = OptimConfig(epochs=epochs, warmup_epochs=warmup_epochs, micro_batch=batch)
    schedule, line = make_schedule(config, videos, ranks, 1)
    assert (schedule.total_steps, schedule.warmup_steps) == ours
    assert "left out" not in line
    per_epoch = videos // (batch * ranks)
    schedule, line = make_schedule(replace(config, drop_last_batch=True), videos, ranks, 1)
    assert (
        (schedule.total_steps, schedule.warmup_steps)
        == theirs
        == (epochs * per_epoch, warmup_epochs * per_epoch)
    )
    assert line.endswith(
        f"; an epoch is {per_epoch} steps, {videos - per_epoch * batch * ranks} of "
        f"its videos are left out"
    )


def test_an_epoch_without_a_whole_step_is_refused_where_its_last_batch_is_dropped():
    config = OptimConfig(micro_batch=16, accumulation=2, steps=10, drop_last_batch=True)
    assert videos_of_epoch(config, 64, 2) == videos_of_epoch(config, 127, 2) == 64
    with pytest.raises(
        ValueError,
        match=r"^optim\.drop_last_batch: 63 videos do not fill one step of 64; lower optim\.glob",
    ) as error:
        make_schedule(config, 63, 2, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decay_tokens", [False, True])
@pytest.mark.parametrize(
    ("positions", "class_token"),
    [("separate", "own"), ("learned", "encoded"), ("sincos", "encoded")],
)
def test_tokens_and_learned_positions_decay_as_in_mae(decay_tokens, positions, class_token):
    model = VideoMAE(
        replace(
            MODEL,
            positions=positions,
            class_tokens=1,
            decoder_class_token=class_token,
            qkv_bias="qkv",
            layer_scale=0.1,
            decoder_embed_bias=True,
        )
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, decay_tokens=decay_tokens)
    decayed = {
        names[id(parameter)]
        for group in groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    tokens = {
        name for name in names.values() if re.search(r"class_token|mask_token|positions", name)
    }
    matrices = {
        name for name, parameter in model.named_parameters() if parameter.ndim >= 2
    } - tokens
    assert len(tokens) == {"separate": 3 + 6, "learned": 2 + 4, "sincos": 2}[positions]
    assert decayed == (matrices | tokens if decay_tokens else matrices)


def test_the_optimizer_is_told_whether_tokens_decay():
    for decay_tokens in (False, True):
        optimizer = make_optimizer(
            VideoMAE(MODEL), OptimConfig(decay_tokens=decay_tokens), fused=False
        )
        decaying = [
            len(group["params"]) for group in optimizer.param_groups if group["weight_decay"] > 0
        ]
        # one mask token more
        assert decaying == [
            len(parameter_groups(VideoMAE(MODEL), 0.05)[0]["params"]) + decay_tokens
        ]


def test_every_parameter_is_in_exactly_one_group_and_vectors_do_not_decay():
    model = VideoMAE(MODEL, ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True))
    groups = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in groups
        for parameter in group["params"]
    }
    for name, decay in decays.items():
        free = (
            name.endswith((".bias", "_bias", "mask_token", "temperature_logit")) or "norm" in name
        )
        assert decay == (0.0 if free else 0.05), name
    assert set(decays.values()) == {0.0, 0.05}


@pytest.mark.parametrize(("depth", "decay"), [(3, 0.5), (12, 0.75)])
def test_layer_decay_gives_each_layer_the_published_scale(depth, decay):
    model = VideoClassifier(replace(MODEL, depth=depth, positions="learned", class_tokens=1), 5)
    groups = parameter_groups(model, 0.05, decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {
        names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]
    }
    assert scales.keys() == set(names.values())
    last = depth + 1
    for name, layer in (
        ("encoder.patch_embed.weight", 0),
        ("encoder.patch_embed.bias", 0),
        ("encoder.class_token", 0),
        ("encoder.positions.table", 0),
        ("encoder.blocks.0.norm1.weight", 1),
        ("encoder.blocks.2.attn.qkv.q_bias", 3),
        (f"encoder.blocks.{depth - 1}.mlp.2.weight", depth),
        ("fc_norm.bias", last),
        ("head.weight", last),
    ):
        assert scales[name] == pytest.approx(decay ** (last - layer)), name
    if (depth, decay) == (3, 0.5):  # by hand
        assert [scales[f"encoder.blocks.{i}.norm1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
        assert (scales["encoder.patch_embed.weight"], scales["head.bias"]) == (0.0625, 1.0)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    decayed = {
        names[id(parameter)]
        for group in groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and "positions" not in name
    }


def test_without_layer_decay_there_are_two_groups_of_one_rate():
    groups = parameter_groups(VideoMAE(MODEL), 0.05)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [
        (0.05, 1.0),
        (0.0, 1.0),
    ]


def test_frozen_parameters_are_not_optimized():
    model = VideoMAE(MODEL)
    model.encoder.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.05)) == sum(
        1 for _ in model.decoder.parameters()
    )


def two_layers() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def fill_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def fused(model: nn.Module) -> Any:
    return torch.optim.AdamW(
        parameter_groups(model, 0.05), lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def guarded_step(model: nn.Module, optimizer: torch.optim.AdamW, clip_grad: float = 0.0) -> float:
    norm = guard(
        optimizer,
        [p.grad for p in model.parameters() if p.grad is not None],
        clip_grad,
        partitioned=False,
    )
    optimizer.step()
    return norm.item()


def test_guarded_steps_are_bit_for_bit_those_of_adamw():
    ours, theirs = two_layers(), two_layers()
    guarded, plain = fused(ours), fused(theirs)
    for step in range(5):
        for model in (ours, theirs):
            fill_gradients(model, step)
        expected = nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item()
        plain.step()
        # nothing to clip
        assert guarded_step(
            ours, guarded, clip_grad=(0.0, 2 * expected)[step % 2]
        ) == pytest.approx(expected)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_step_that_is_not_finite_leaves_weights_and_state_alone(bad, clip_grad):
    model = two_layers()
    optimizer = fused(model)
    fill_gradients(model, 0)
    guarded_step(model, optimizer, clip_grad)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    fill_gradients(model, 1)
    model[2].weight.grad[1, 2] = bad
    assert not math.isfinite(guarded_step(model, optimizer, clip_grad))
    assert optimizer.found_inf == 1
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for before, after in zip(
        state["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert before.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(before[key], after[key]) for key in before)
    fill_gradients(model, 2)
    guarded_step(model, optimizer, clip_grad)
    assert optimizer.found_inf == 0
    assert any(
        not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_clipping_is_that_of_torch(scale):
    ours, theirs = two_layers(), two_layers()
    guarded, plain = fused(ours), fused(theirs)
    for step in range(3):  # AdamW's first step does not see a common factor
        fill_gradients(ours, step, scale * (step + 1))
        fill_gradients(theirs, step, scale * (step + 1))
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        assert guarded_step(ours, guarded, 0.5) == pytest.approx(norm.item())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad_rank", [None, 0, 1])
def test_ranks_with_parts_of_the_gradients_know_the_norm_of_all_and_decide_alike(
    bad_rank, monkeypatch
):
    parts = [[torch.full((5,), 3.0), torch.zeros(0)], [torch.full((2, 2), -1.0)]]
    if bad_rank is not None:
        parts[bad_rank][0].view(-1)[3] = math.nan
    squares = [sum(gradient.square().sum() for gradient in part) for part in parts]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(sum(squares)))
    for part in parts:
        optimizer = fused(two_layers())
        norm = guard(optimizer, part, 2.0, partitioned=True)
        assert optimizer.found_inf == (bad_rank is not None)
        if bad_rank is None:
            assert norm.item() == pytest.approx(7.0)
            assert optimizer.grad_scale.item() == pytest.approx(3.5)


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_it():
    gradients = [torch.full((n,), 1.0, dtype=torch.bfloat16) for n in (1000, 3)]
    assert guard(fused(two_layers()), gradients, 0.0, partitioned=False).item() == pytest.approx(
        math.sqrt(1003), rel=1e-6
    )


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_has_the_configured_numbers(fused):
    optimizer = make_optimizer(
        VideoMAE(MODEL), OptimConfig(weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7), fused=fused
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(
        group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 and group["fused"] == fused
        for group in optimizer.param_groups
    )
