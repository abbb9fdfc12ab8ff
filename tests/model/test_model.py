"""The model against a second implementation, and what it promises beyond equal numbers."""

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenMask,
    VideoClassifier,
    VideoMAE,
    token_mask,
)
from video_mae.model.blocks import PackedProjection
from video_mae.model.masking import mask_counts
from video_mae.model.positions import sinusoid_positions
from video_mae.model.vit import pretraining_macs

second = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "second_implementation.py"))
)

SMALL = ModelConfig(
    num_frames=8,
    height=32,
    width=48,
    patch_size=16,
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
)
GRAY = {"mean": (0.4,), "std": (0.3,)}
TUBE, CHANNEL = ("tube", 0.7, 0.0), ObjectiveConfig()
# (model, mask, objective): each differs from the plain case in something that could go wrong
CASES: dict[str, tuple[ModelConfig, tuple[Any, float, float], ObjectiveConfig]] = {
    "tube": (SMALL, TUBE, CHANNEL),
    "random mask, joint statistics": (
        SMALL,
        ("random", 0.75, 0.0),
        ObjectiveConfig(normalize="tubelet"),
    ),
    "frame mask, raw pixels": (SMALL, ("frame", 0.5, 0.0), ObjectiveConfig(normalize="none")),
    "dual masking": (SMALL, ("tube", 0.7, 0.5), CHANNEL),
    "dual masking of a random mask": (
        SMALL,
        ("random", 0.7, 0.25),
        ObjectiveConfig(contrastive_weight=0.2),
    ),
    "patch 14, one decoder block": (
        replace(SMALL, height=28, width=42, patch_size=14, mlp_ratio=48 / 11, decoder_depth=1),
        TUBE,
        CHANNEL,
    ),
    "tubelet of one frame": (
        replace(SMALL, num_frames=3, tubelet_size=1, height=32, width=32, patch_size=8),
        TUBE,
        CHANNEL,
    ),
    "tubelet of four, contrastive": (
        replace(SMALL, tubelet_size=4),
        TUBE,
        ObjectiveConfig(contrastive_weight=0.5),
    ),
    "still image": (
        replace(SMALL, num_frames=1, tubelet_size=1, height=48, width=32, patch_size=8),
        ("random", 0.75, 0.0),
        ObjectiveConfig(normalize="tubelet"),
    ),
    "one channel": (
        replace(SMALL, in_channels=1, **GRAY),
        TUBE,
        ObjectiveConfig(contrastive_weight=1.0, temperature=0.5),
    ),
    "five channels": (
        replace(
            SMALL, in_channels=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5, 0.4, 0.3, 0.2, 0.1)
        ),
        TUBE,
        ObjectiveConfig(normalize="tubelet", contrastive_weight=0.3, negatives="batch"),
    ),
    "odd heads, deep": (
        replace(
            SMALL,
            embed_dim=30,
            num_heads=5,
            depth=4,
            decoder_embed_dim=18,
            decoder_num_heads=9,
            decoder_depth=3,
        ),
        ("random", 0.5, 0.0),
        CHANNEL,
    ),
    "no bias of queries and values, layer scale": (
        replace(SMALL, qkv_bias="none", layer_scale=0.3),
        TUBE,
        CHANNEL,
    ),
    "epsilons of Hugging Face": (replace(SMALL, norm_eps=1e-12, head_norm_eps=1e-5), TUBE, CHANNEL),
    "large epsilons": (replace(SMALL, norm_eps=0.5, head_norm_eps=0.2), TUBE, CHANNEL),
    "learned temperature": (
        SMALL,
        TUBE,
        ObjectiveConfig(contrastive_weight=0.3, temperature=0.2, learn_temperature=True),
    ),
}


def shaken(model: Any, seed: int = 0) -> Any:
    """Biases, norms and tokens away from 0 and 1, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_clip(config: ModelConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    shape = (batch, config.num_frames, config.height, config.width, config.in_channels)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def mask_of(
    config: ModelConfig, settings: tuple[Any, float, float] = TUBE, batch: int = 2
) -> TokenMask:
    return token_mask(torch.arange(batch) + 7, config.grid, *settings)


def official_video(
    clip_BTHWC: torch.Tensor, config: ModelConfig, dtype: torch.dtype
) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (config.mean, config.std))
    pixels = clip_BTHWC.double() / (255 if clip_BTHWC.dtype == torch.uint8 else 1)
    return ((pixels - mean) / std).permute(0, 4, 1, 2, 3).to(dtype)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * max(
        1.0, theirs.abs().max().item()
    ), what


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("case", CASES)
def test_predictions_losses_and_gradients_equal_the_second_implementation(case, dtype, tolerance):
    config, settings, objective = CASES[case]
    torch.manual_seed(0)
    model = shaken(VideoMAE(config, objective)).to(dtype)
    clip, mask = random_clip(config), mask_of(config, settings)
    if dtype == torch.float64:
        clip = clip.double() / 255
    output = model(clip, mask)
    output.loss.backward()

    state = second.official_state(model, (config.in_channels, *config.tubelet))
    hidden = torch.ones(len(clip), config.num_tokens, dtype=torch.bool).scatter(
        1, mask.visible_BV, False
    )
    decoded = torch.zeros_like(hidden).scatter(1, mask.masked_BM, True)
    video = official_video(clip, config, dtype)
    predicted = second.pretraining_forward(
        video,
        state,
        hidden,
        decoded,
        (config.depth, config.decoder_depth),
        (config.num_heads, config.decoder_num_heads),
        (config.norm_eps, config.head_norm_eps),
    )
    target = second.targets(
        video, config.mean, config.std, config.tubelet, hidden & decoded, objective.normalize
    )
    reconstruction = (predicted.double() - target).square().mean()
    temperature: Any = objective.temperature
    if objective.learn_temperature:
        temperature = 0.01 ** torch.sigmoid(state["objective.temperature_logit"])
        tolerance = max(tolerance, 1e-6)  # tau is float32 whatever the rest is
    contrastive = torch.zeros(())
    if objective.contrastive_weight:
        contrastive = second.contrastive(
            predicted.double(), target, temperature, objective.negatives
        )
    loss = reconstruction + objective.contrastive_weight * contrastive
    loss.backward()

    assert_close(output.predicted_BMP, predicted, tolerance, "predicted")
    assert_close(output.reconstruction_loss, reconstruction, tolerance, "reconstruction loss")
    assert_close(output.contrastive_loss, contrastive, tolerance, "contrastive loss")
    assert_close(output.loss, loss, tolerance, "loss")
    for name, parameter in model.named_parameters():
        gradient = state[second.official_name(name)].grad
        assert gradient.abs().max() > 0, name
        assert_close(parameter.grad.flatten(), gradient.flatten(), tolerance, name)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_classifier_is_mean_pooling_then_norm_then_head_or_norm_then_the_first_token(pooling):
    config = replace(SMALL, norm_eps=1e-3, head_norm_eps=0.1)
    model = shaken(
        VideoClassifier(
            config, ClassifierConfig(num_classes=7, head_init_scale=1.0, pooling=pooling)
        )
    ).double()
    clip = random_clip(SMALL)
    state = second.official_state(model, (SMALL.in_channels, *SMALL.tubelet))
    x = second.embed(official_video(clip, SMALL, torch.float64), state)
    x = second.blocks(x, state, "encoder.blocks", SMALL.depth, SMALL.num_heads, 1e-3)
    pooled = (
        second.norm(x.mean(1), state, "fc_norm", 0.1)
        if pooling == "mean"
        else second.norm(x, state, "encoder.norm", 1e-3)[:, 0]
    )
    assert_close(model(clip), pooled @ state["head.weight"].T + state["head.bias"], 1e-9, "logits")
    absent = "encoder.norm." if pooling == "mean" else "fc_norm."
    assert not any(name.startswith(absent) for name in model.state_dict())


@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (1568, 768), (392, 18)])
def test_positions_are_the_sinusoid_table(tokens, width):
    torch.testing.assert_close(
        sinusoid_positions(tokens, width), second.sinusoid_table(tokens, width), rtol=0, atol=1e-7
    )


def test_all_tokens_are_the_default_and_any_order_is_kept():
    encoder = shaken(VideoMAE(SMALL)).encoder.eval()
    clip = random_clip(SMALL)
    tokens = encoder(clip)
    order = torch.randperm(SMALL.num_tokens, generator=torch.Generator().manual_seed(0)).expand(
        2, -1
    )
    assert torch.equal(tokens, encoder(clip, torch.arange(SMALL.num_tokens).expand(2, -1)))
    assert_close(encoder(clip, order), tokens[:, order[0]], 1e-5, "order")


def test_encoder_never_sees_a_hidden_pixel():
    encoder, clip, mask = shaken(VideoMAE(SMALL)).encoder, random_clip(SMALL), mask_of(SMALL)
    hidden = torch.ones(2, SMALL.num_tokens, dtype=torch.bool).scatter(1, mask.visible_BV, False)
    time, rows, columns = SMALL.grid
    hidden = hidden.reshape(2, time, rows, columns)
    for axis, size in zip((1, 2, 3), SMALL.tubelet, strict=True):
        hidden = hidden.repeat_interleave(size, dim=axis)
    changed = torch.where(hidden[..., None], 255 - clip, clip)
    assert not torch.equal(changed, clip)
    assert torch.equal(encoder(clip, mask.visible_BV), encoder(changed, mask.visible_BV))


def test_integer_clip_equals_float_clip():
    model, clip, mask = shaken(VideoMAE(SMALL)), random_clip(SMALL), mask_of(SMALL)
    for ours, theirs in zip(model(clip, mask), model(clip.float() / 255, mask), strict=True):
        assert_close(ours, theirs, 1e-5, "output")


@pytest.mark.parametrize(
    "shape", [(2, 8, 32, 32, 3), (2, 16, 32, 48, 3), (2, 8, 32, 48, 1), (2, 3, 8, 32, 48)]
)
def test_clip_of_another_size_is_refused_with_both_sizes(shape):
    with pytest.raises(ValueError, match=r"\(8, 32, 48, 3\)") as error:
        VideoMAE(SMALL)(torch.zeros(shape, dtype=torch.uint8), mask_of(SMALL))
    assert str(tuple(shape[1:])) in str(error.value)


def results(model: Any, run: Any) -> list[torch.Tensor]:
    model.zero_grad()
    output = run(random_clip(SMALL), mask_of(SMALL))
    output.loss.backward()
    return [output.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_activation_checkpointing_changes_nothing():
    plain, thrifty = (
        VideoMAE(SMALL, checkpointing=checkpointing) for checkpointing in (False, True)
    )
    thrifty.load_state_dict(shaken(plain).state_dict())
    for ours, theirs in zip(results(thrifty, thrifty), results(plain, plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph_to_the_same_numbers(checkpointing):
    objective = ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True)
    model = shaken(
        VideoMAE(replace(SMALL, depth=1, decoder_depth=1), objective, checkpointing=checkpointing)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(model, compiled), results(model, model), strict=True):
        assert_close(ours, theirs, 1e-5, "compiled")


@pytest.mark.parametrize("start", [0.011, 0.07, 0.5, 0.999])
def test_learned_temperature_starts_as_told_and_stays_between_a_hundredth_and_one(start):
    model: Any = VideoMAE(
        SMALL, ObjectiveConfig(contrastive_weight=1.0, temperature=start, learn_temperature=True)
    )
    assert model.objective.temperature().item() == pytest.approx(start, rel=1e-5)
    for value in (-8.0, -1.0, 1.0, 8.0, -1e4, 1e4):
        model.objective.temperature_logit.data.fill_(value)
        temperature = model.objective.temperature()
        assert 0.0099999 < temperature.item() <= 1
        (gradient,) = torch.autograd.grad(temperature, model.objective.temperature_logit)
        assert gradient < 0 or abs(value) > 100  # not stuck


def test_stochastic_depth_grows_linearly_and_rests_in_evaluation():
    encoder = VideoMAE(replace(SMALL, depth=3, drop_path=0.4)).encoder
    assert [getattr(block.drop_path, "p", 0.0) for block in encoder.blocks] == pytest.approx(
        [0.0, 0.2, 0.4]
    )
    clip = random_clip(SMALL)
    assert torch.equal(encoder.eval()(clip), encoder(clip))


# Layers, widths and heads of the official checkpoints; millions of parameters of the fine-tuned
# model as its papers give them.
PUBLISHED = [
    ("small", 384, 12, 6, 192, 4, 1536, 1536, 22),
    ("base", 768, 12, 12, 384, 4, 3072, 1536, 87),
    ("large", 1024, 24, 16, 512, 12, 4096, 1536, 305),
    ("huge", 1280, 32, 16, 640, 12, 5120, 1536, 633),
    ("giant", 1408, 40, 16, 512, 4, 6144, 1176, 1013),
]


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "decoder", "decoder_depth", "hidden", "values", "millions"),
    PUBLISHED,
)
def test_presets_have_the_published_shapes(
    name, width, depth, heads, decoder, decoder_depth, hidden, values, millions
):
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        shapes = {
            key: tuple(parameter.shape) for key, parameter in VideoMAE(config).named_parameters()
        }
        classifier = VideoClassifier(config, 400)
    assert shapes[f"encoder.blocks.{depth - 1}.mlp.0.weight"] == (hidden, width)
    assert f"encoder.blocks.{depth}.norm1.weight" not in shapes
    assert shapes["encoder.patch_embed.weight"] == (width, values)
    assert config.num_heads == heads
    assert shapes["encoder.blocks.0.attn.qkv.weight"] == (3 * width, width)
    assert shapes["decoder.encoder_to_decoder.weight"] == (decoder, width)
    assert shapes["decoder.mask_token"] == (decoder,)
    assert shapes[f"decoder.blocks.{decoder_depth - 1}.norm1.weight"] == (decoder,)
    assert f"decoder.blocks.{decoder_depth}.norm1.weight" not in shapes
    assert shapes["decoder.head.weight"] == (values, decoder)
    assert not any("k_bias" in key or "positions" in key for key in shapes)
    assert sum(p.numel() for p in classifier.parameters()) / 1e6 == pytest.approx(
        millions, rel=0.02
    )


# GMACs a clip of 16 x 224 x 224 at ratio 0.9: visible patch embedding + encoder + decoder layers +
# attention + head.
MACS = [
    ("small", {}, 0.09 + 3.6 + 2.8 + 3.8 + 0.4),
    ("base", {}, 0.19 + 14.1 + 11.1 + 7.6 + 0.8),
    ("large", {}, 0.25 + 49.6 + 59.2 + 30.2 + 1.1),
    ("large", {"decoder_depth": 4}, 0.25 + 49.6 + 19.7 + 10.1 + 1.1),
    ("huge", {}, 0.31 + 102.8 + 92.5 + 37.8 + 1.4),
    ("giant", {}, 0.34 + 214.8 + 25.8 + 17.2 + 1.1),
]


@pytest.mark.parametrize(("name", "changes", "giga"), MACS)
def test_operations_counted_equal_the_published_ones(name, changes, giga):
    config = ModelConfig.preset(name, **changes)
    assert pretraining_macs(config, *mask_counts(config.grid, "tube", 0.9)) / 1e9 == pytest.approx(
        giga, rel=0.02
    )


def test_initialization_is_the_official_one():
    torch.manual_seed(0)
    model = VideoMAE(replace(SMALL, embed_dim=96, decoder_embed_dim=64))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert module.eps == 1e-6, name
        if isinstance(module, torch.nn.Linear | PackedProjection):
            fan_out, fan_in = module.weight.shape
            default = name in ("encoder.patch_embed", "decoder.encoder_to_decoder")
            bound = 1 / math.sqrt(fan_in) if default else math.sqrt(6 / (fan_in + fan_out))
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            assert (module.bias.abs().max() > 0) == (name == "encoder.patch_embed"), name
    assert model.decoder.encoder_to_decoder.bias is None
    assert model.decoder.mask_token.std() > 0.005
    assert model.decoder.mask_token.abs().max() <= 0.02
    assert all(
        (p == 0).all()
        for name, p in model.named_parameters()
        if name.endswith(("q_bias", "v_bias"))
    )


def test_keys_have_no_bias():
    layer = shaken(PackedProjection(6))
    assert (
        layer(torch.zeros(1, 1, 6)).flatten().unflatten(0, (3, 6)).count_nonzero(1)
        == torch.tensor([6, 0, 6])
    ).all()


def test_classifier_starts_from_normal_weights_and_a_small_head():
    torch.manual_seed(0)
    model = VideoClassifier(replace(SMALL, embed_dim=96), 50)
    weights = dict(model.named_parameters())
    assert weights["encoder.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert (model.head.bias == 0).all()
