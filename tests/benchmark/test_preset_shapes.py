"""The shapes that kernels are benchmarked, compiled and tested at are those that presets and
recipes make.
"""

from pathlib import Path

import pytest

from video_mae.config import ModelConfig, load_config
from video_mae.config.model import PRESETS
from video_mae.kernels import preset_shapes as preset_shapes
from video_mae.kernels.preset_shapes import ENCODER_TOKENS, SHAPES, AttentionShape, attention_shapes
from video_mae.model.masking import mask_counts

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "configs" / "pretrain").glob("*.yaml"))
CLIP = {"num_frames": 16, "height": 224, "width": 224}


def dimensions(model: ModelConfig) -> tuple[int, ...]:
    pairs = ((model.num_heads, model.embed_dim), (model.decoder_num_heads, model.decoder_embed_dim))
    return tuple(number for heads, width in pairs for number in (heads, width // heads))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_tokens_that_its_masks_leave(preset: str) -> None:
    (shape,) = (shape for shape in SHAPES if shape.preset == preset)
    model = ModelConfig.preset(preset)
    assert {name: getattr(model, name) for name in CLIP} == CLIP
    visible, masked = mask_counts(model.grid, "tube", 0.9)
    dual_visible, dual = mask_counts(model.grid, "tube", 0.9, 0.5)
    assert (shape.tubelet, shape.tokens) == (model.tubelet, model.num_tokens)
    assert (shape.visible, shape.masked, shape.dual) == (visible, masked, dual)
    assert dual_visible == visible
    assert shape[6:] == dimensions(model)


def test_every_shape_is_of_a_preset() -> None:
    assert [shape.preset for shape in SHAPES] == list(PRESETS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_the_encoder_tokens_that_are_checked(path: Path) -> None:
    config = load_config(path)
    mask = config.mask
    visible, masked = mask_counts(config.model.grid, mask.kind, mask.ratio, mask.decoder_mask_ratio)
    assert visible + config.model.class_tokens in ENCODER_TOKENS
    same = [
        shape
        for shape in SHAPES
        if shape[6:] == dimensions(config.model) and shape.tokens == config.model.num_tokens
    ]
    if same and (mask.kind, mask.ratio) == ("tube", 0.9):
        assert (visible, masked) in [
            (shape.visible, count) for shape in same for count in (shape.masked, shape.dual)
        ]


def test_no_encoder_is_checked_that_no_recipe_has() -> None:
    found = set()
    for path in RECIPES:
        config = load_config(path)
        visible, _ = mask_counts(
            config.model.grid, config.mask.kind, config.mask.ratio, config.mask.decoder_mask_ratio
        )
        found.add(visible + config.model.class_tokens)
    assert found == set(ENCODER_TOKENS)


def test_decoders_have_the_lengths_of_the_official_code() -> None:
    lengths = {shape.name: shape.tokens for shape in attention_shapes()}
    assert (lengths["decoder base"], lengths["decoder dual base"]) == (1568, 864)
    assert (lengths["encoder giant"], lengths["decoder giant"], lengths["decoder dual giant"]) == (
        208,
        2048,
        1128,
    )
    assert AttentionShape("encoder huge", 160, 16, 80) in attention_shapes()
    assert preset_shapes.SHAPES[4].head_width == 88
