"""Image MAE, mae_st and what lies between, against a second implementation; models of images made
into models of video and back.
"""

import runpy
from collections.abc import Callable
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
    random_mask,
    tube_mask,
)
from video_mae.model.inflation import deflated, inflated
from video_mae.model.objective import pixel_scale, predicted_clip, target_clip
from video_mae.model.vit import Encoder
from video_mae.training.picture import reconstruction_frames

second = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "second_implementation.py"))
)

MAE = ModelConfig(
    num_frames=1,
    tubelet_size=1,
    height=24,
    width=40,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    positions="sincos",
    class_tokens=1,
    qkv_bias="qkv",
    decoder_embed_bias=True,
)
MAE_ST = replace(
    MAE,
    num_frames=6,
    tubelet_size=2,
    height=16,
    positions="separate",
    decoder_class_token="own",
    mean=(0.45,),
    std=(0.225,),
)
JOINT = ObjectiveConfig(normalize="tubelet", pixels="normalized")
# (model, objective): what the importer of another project's weights makes of them
CASES: dict[str, tuple[ModelConfig, ObjectiveConfig]] = {
    "MAE": (MAE, JOINT),
    "MAE, raw pixels": (MAE, replace(JOINT, normalize="none")),
    "Hugging Face's ViTMAE, tables of a file": (
        replace(MAE, norm_eps=1e-12, head_norm_eps=1e-12, positions="learned"),
        JOINT,
    ),
    "MAE without a class token": (replace(MAE, class_tokens=0), JOINT),
    "MAE of five channels": (
        replace(MAE, in_channels=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5, 0.4, 0.3, 0.2, 0.1)),
        JOINT,
    ),
    "MAE on video": (replace(MAE, num_frames=6, tubelet_size=2), JOINT),
    "mae_st": (MAE_ST, JOINT),
    "mae_st, half of the frames": (replace(MAE_ST, predicted_frames=3), JOINT),
    "mae_st, half of the frames, two a tubelet": (
        replace(MAE_ST, num_frames=12, tubelet_size=4, predicted_frames=6),
        JOINT,
    ),
    "mae_st, one table": (replace(MAE_ST, positions="learned", predicted_frames=3), JOINT),
    "mae_st, no class token": (replace(MAE_ST, class_tokens=0), replace(JOINT, normalize="none")),
    "mae_st, one table, no class token": (
        replace(MAE_ST, positions="learned", class_tokens=0),
        JOINT,
    ),
}


def shaken(model: Any, seed: int = 0) -> Any:
    """Biases, norms, tokens and tables away from where they start: none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or ".positions." in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_clip(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    shape = (batch, config.num_frames, config.height, config.width, config.in_channels)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def normalised_video(
    clip_BTHWC: torch.Tensor, config: ModelConfig, dtype: torch.dtype
) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (config.mean, config.std))
    pixels = clip_BTHWC.double() / (255 if clip_BTHWC.dtype == torch.uint8 else 1)
    return ((pixels - mean) / std).permute(0, 4, 1, 2, 3).to(dtype)


def their_state(leaves: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The official names and layouts; fixed tables are in MAE's files, with a row of zeros for the
    class token.
    """
    kernel = (config.in_channels, *config.tubelet[0 if config.num_frames > 1 else 1 :])
    state = second.mae_state(leaves, kernel, separate_linears=config.decoder_class_token == "own")
    if config.positions == "sincos":
        for under, width in (("", config.embed_dim), ("decoder_", config.decoder_embed_dim)):
            table = second.place_table(config.grid, width)
            state[f"{under}pos_embed"] = torch.cat(
                [torch.zeros(config.class_tokens, width), table]
            )[None]
    return state


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * max(
        1.0, theirs.abs().max().item()
    ), what


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("case", CASES)
def test_predictions_losses_and_gradients_equal_the_second_implementation(case, dtype, tolerance):
    config, objective = CASES[case]
    torch.manual_seed(0)
    model = shaken(VideoMAE(config, objective)).to(dtype)
    clip, mask = random_clip(config), random_mask(torch.arange(2) + 3, config.grid, 0.7)
    if dtype == torch.float64:
        clip = clip.double() / 255
    output = model(clip, mask)
    output.loss.backward()

    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    hidden = torch.ones(2, config.num_tokens, dtype=torch.bool).scatter(1, mask.visible_BV, False)
    video = normalised_video(clip, config, dtype)
    predicted = second.mae_forward(
        video,
        their_state(leaves, config),
        hidden,
        (config.depth, config.decoder_depth),
        (config.num_heads, config.decoder_num_heads),
        config.norm_eps,
    )
    frames = [
        int(i * (config.num_frames - 1) / max(1, n - 1) + 1e-9)
        for n in [config.predicted_frames or config.num_frames]
        for i in range(n)
    ]
    tubelet = (len(frames) // config.grid[0], config.patch_size, config.patch_size)
    target = second.targets(
        video[:, :, frames], (0.0,), (1.0,), tubelet, hidden, objective.normalize
    )
    loss = (predicted.double() - target).square().mean()
    loss.backward()

    assert_close(output.predicted_BMP, predicted, tolerance, "predicted")
    assert_close(output.loss, loss, tolerance, "loss")
    for name, parameter in model.named_parameters():
        gradient = leaves[name].grad
        assert gradient is not None, name
        assert (
            gradient.abs().max() > 0.0 if "k_bias" not in name else gradient.abs().max() < 1e-6
        ), name
        assert_close(parameter.grad, gradient, tolerance, name)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize(
    "config",
    [
        MAE,
        replace(MAE, positions="learned"),
        replace(MAE, class_tokens=0),
        MAE_ST,
        replace(MAE, layer_scale=0.7),
    ],
    ids=["fixed", "learned", "no class token", "mae_st", "layer scale"],
)
def test_classifiers_equal_the_second_implementation(config, pooling):
    head = ClassifierConfig(num_classes=5, head_init_scale=1.0, pooling=pooling)
    model, clip = shaken(VideoClassifier(config, head)).double(), random_clip(config)
    assert (
        ("fc_norm.weight" in model.state_dict())
        == (pooling == "mean")
        != ("encoder.norm.weight" in model.state_dict())
    )
    state = their_state(dict(model.named_parameters()), config)
    logits = second.mae_classify(
        normalised_video(clip, config, torch.float64),
        state,
        config.num_tokens,
        config.depth,
        config.num_heads,
    )
    assert_close(model(clip), logits, 1e-9, "logits")


@pytest.mark.parametrize("final_norm", [True, False])
def test_the_encoder_stands_alone_with_the_class_token_first(final_norm):
    encoder, clip = shaken(Encoder(MAE, final_norm=final_norm)).double(), random_clip(MAE)
    state = their_state(
        {f"encoder.{name}": parameter for name, parameter in encoder.named_parameters()}, MAE
    )
    hidden = torch.zeros(2, MAE.num_tokens, dtype=torch.bool)
    tokens = second.mae_encode(
        normalised_video(clip, MAE, torch.float64),
        state,
        hidden,
        MAE.depth,
        MAE.num_heads,
        MAE.norm_eps,
    )
    if final_norm:
        tokens = second.norm(tokens, state, "norm")
    assert tokens.shape == (2, 1 + MAE.num_tokens, MAE.embed_dim)
    assert_close(encoder(clip), tokens, 1e-9, "tokens")


def test_half_of_the_frames_are_those_of_mae_st():
    clip = torch.arange(16, dtype=torch.uint8)[None, :, None, None, None].expand(1, -1, 8, 8, 1)
    config = replace(MAE_ST, num_frames=16, height=8, width=8, in_channels=1, predicted_frames=8)
    assert predicted_clip(clip, config)[0, :, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 15]
    assert predicted_clip(clip[:, :4], config).shape[1] == 2
    assert predicted_clip(clip, replace(config, predicted_frames=None)) is clip


def test_pixels_are_compared_as_they_are_unless_the_objective_says_so():
    clip = random_clip(MAE)
    assert target_clip(clip, MAE, ObjectiveConfig()) is clip
    expected = normalised_video(clip, MAE, torch.float64).permute(0, 2, 3, 4, 1)
    assert_close(target_clip(clip, MAE, JOINT), expected, 1e-6, "uint8")
    assert_close(target_clip(clip.double() / 255, MAE, JOINT), expected, 1e-12, "float64")
    assert_close(
        target_clip((clip.to(torch.int32) * 257).to(torch.uint16), MAE, JOINT),
        expected,
        1e-6,
        "uint16",
    )


@pytest.mark.parametrize("normalize", ["channel", "tubelet", "none"])
def test_a_picture_of_perfect_normalised_predictions_is_the_clip(normalize):
    config, objective = (
        replace(MAE_ST, predicted_frames=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)),
        replace(JOINT, normalize=normalize),
    )
    clip, mask = random_clip(config), random_mask(torch.arange(2), config.grid, 0.5)
    frames = predicted_clip(clip, config)
    target = second.targets(
        normalised_video(frames, config, torch.float64),
        (0.0,),
        (1.0,),
        config.predicted_tubelet,
        torch.ones(2, config.num_tokens, dtype=torch.bool).scatter(1, mask.visible_BV, False),
        normalize,
    )
    drawn = reconstruction_frames(
        frames,
        mask.visible_BV,
        mask.masked_BM,
        target,
        config.predicted_tubelet,
        normalize,
        "truth",
        pixel_scale(config, objective),
    )
    assert torch.equal(drawn.predicted, frames)


KINDS = [
    replace(MAE, positions=positions, class_tokens=class_tokens, decoder_class_token=token)
    for positions in ("sinusoid", "sincos", "learned", "separate")
    for class_tokens, token in ((0, "encoded"), (1, "encoded"), (1, "own"))
]
KIND_NAMES = [f"{c.positions}, {c.class_tokens} {c.decoder_class_token}" for c in KINDS]


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("config", KINDS, ids=KIND_NAMES)
def test_inflation_keeps_the_logits_of_a_still_clip_and_deflation_those_of_the_image(
    config, pooling
):
    image = random_clip(config)
    model = (
        shaken(
            VideoClassifier(
                config, ClassifierConfig(num_classes=5, head_init_scale=1.0, pooling=pooling)
            )
        )
        .double()
        .eval()
    )
    for num_frames, tubelet_size in ((8, 2), (6, 3), (3, 1)):
        video_model = inflated(model, num_frames, tubelet_size)
        assert video_model.config.grid == (num_frames // tubelet_size, *config.grid[1:])
        assert_close(
            video_model(image.expand(-1, num_frames, -1, -1, -1)), model(image), 1e-9, "inflated"
        )
        assert_close(deflated(video_model)(image), model(image), 1e-9, "deflated")
        assert not video_model.training


@pytest.mark.parametrize("config", KINDS, ids=KIND_NAMES)
def test_inflation_predicts_the_image_in_every_frame(config):
    model, image = shaken(VideoMAE(config, JOINT)).double(), random_clip(config)
    video_model = inflated(model, 8)
    mask, video_mask = (tube_mask(torch.arange(2), m.grid, 0.6) for m in (model, video_model))
    predicted = model.predict(image, mask)
    video_predicted = (
        video_model.predict(image.expand(-1, 8, -1, -1, -1), video_mask)
        .unflatten(2, (2, -1))
        .unflatten(1, (4, -1))
    )
    assert_close(
        video_predicted, predicted[:, None, :, None].expand_as(video_predicted), 1e-9, "predicted"
    )
    back = deflated(video_model)
    assert_close(back.predict(image, mask), predicted, 1e-9, "deflated")
    assert back.objective_config == JOINT


def test_an_inflated_model_tells_frames_apart_once_its_times_are_learned():
    model = shaken(VideoMAE(MAE, JOINT))
    video_model = inflated(model, 8)
    clip, mask = (
        random_clip(video_model.config),
        random_mask(torch.arange(2), video_model.grid, 0.6),
    )
    assert torch.equal(video_model.encoder.positions.time, torch.zeros(4, MAE.embed_dim))
    video_model(clip, mask).loss.backward()
    gradients = [part.positions.time.grad for part in (video_model.encoder, video_model.decoder)]
    assert all((gradient[0] - gradient[1]).abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "change", [lambda model: inflated(model, 8), deflated], ids=["inflated", "deflated"]
)
def test_the_model_that_was_given_keeps_its_weights(change: Callable[[Any], Any]):
    model = shaken(VideoMAE(replace(MAE, positions="separate")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = change(model)
    for parameter in changed.parameters():
        parameter.data.fill_(7)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_only_a_model_of_images_is_inflated():
    with pytest.raises(
        ValueError, match=r"model.num_frames: 6 with model.tubelet_size = 2 is a model of video"
    ):
        inflated(VideoMAE(MAE_ST), 8)
    with pytest.raises(ValueError, match=r"^num_frames: 7 is not a multiple"):
        inflated(VideoMAE(MAE), 7)


def test_the_mask_and_class_tokens_are_not_confused():
    """A decoder that is given class tokens predicts from the tokens after them."""
    model, clip = shaken(VideoMAE(MAE, JOINT)), random_clip(MAE)
    mask = random_mask(torch.arange(2), MAE.grid, 0.7)
    encoded = model.encoder(clip, mask.visible_BV)
    assert encoded.shape[1] == 1 + mask.visible_BV.shape[1]
    order = torch.randperm(mask.visible_BV.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = TokenMask(mask.visible_BV[:, order], mask.masked_BM)
    assert_close(
        model.decoder(torch.cat([encoded[:, :1], encoded[:, 1:][:, order]], dim=1), shuffled),
        model.decoder(encoded, mask),
        1e-5,
        "order",
    )
