"""Any grid: positions of every kind computed or interpolated, clips of other sizes, masks of other
grids.
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    ObjectiveConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    save_model_folder,
    tube_mask,
)
from video_mae.model.inflation import resized
from video_mae.model.positions import (
    Positions,
    _remembered_positions,
    computed_positions,
    interpolate_positions,
    sincos_positions,
)
from video_mae.model.vit import Encoder
from video_mae.training.optim import parameter_groups

second = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "second_implementation.py"))
)

Grid = tuple[int, int, int]
BASE = ModelConfig(
    num_frames=6,
    height=24,
    width=40,
    patch_size=8,
    embed_dim=24,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
KINDS = ("sinusoid", "sincos", "learned", "separate")
GRIDS: tuple[Grid, ...] = (
    (3, 3, 5),
    (4, 3, 5),
    (3, 5, 3),
    (3, 2, 7),
    (1, 1, 1),
    (32, 6, 2),
    (2, 9, 1),
)
# every way in which a table meets a grid
CHOICES = [
    ("sinusoid", "interpolate"),
    ("sinusoid", "compute"),
    ("sincos", "interpolate"),
    ("sincos", "compute"),
    ("learned", "interpolate"),
    ("separate", "interpolate"),
]


def torch_interpolated(table_ND: torch.Tensor, grid: Grid, new_grid: Grid) -> torch.Tensor:
    """PyTorch's bicubic interpolation of every frame as an image, then its linear one of every
    place over time.
    """
    table = table_ND.reshape(*grid, -1)
    if grid[1:] != new_grid[1:]:
        table = F.interpolate(table.permute(0, 3, 1, 2), size=new_grid[1:], mode="bicubic").permute(
            0, 2, 3, 1
        )
    if grid[0] != new_grid[0]:
        lines = table.flatten(1, 3).T[None]
        table = F.interpolate(lines, size=new_grid[0], mode="linear")[0].T.reshape(
            new_grid[0], *table.shape[1:]
        )
    return table.reshape(-1, table_ND.shape[1])


def expected_positions(
    model: Any, choice: str, grid: Grid, made_for: Grid = BASE.grid
) -> torch.Tensor:
    """By the definition, from the parameters of an encoder or decoder."""
    kind, width = model.positions.kind, model.blocks[0].norm1.weight.shape[0]
    if kind == "separate":
        space = torch_interpolated(
            model.positions.space, (1, made_for[1], made_for[2]), (1, grid[1], grid[2])
        )
        time = torch_interpolated(model.positions.time, (made_for[0], 1, 1), (grid[0], 1, 1))
        return space.repeat(grid[0], 1) + time.repeat_interleave(len(space), 0)
    if kind == "learned":
        return torch_interpolated(model.positions.table, made_for, grid)

    def compute(grid: Grid) -> torch.Tensor:
        table = (
            second.sinusoid_table(grid[0] * grid[1] * grid[2], width)
            if kind == "sinusoid"
            else second.place_table(grid, width)
        )
        return table.to(model.blocks[0].norm1.weight.dtype)

    return (
        compute(grid)
        if choice == "compute"
        else torch_interpolated(compute(made_for), made_for, grid)
    )


def clip_of(grid: Grid, config: ModelConfig = BASE, batch: int = 2) -> torch.Tensor:
    sides = [tokens * unit for tokens, unit in zip(grid, config.tubelet, strict=True)]
    return torch.randint(
        0,
        256,
        (batch, *sides, config.in_channels),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * max(
        1.0, theirs.abs().max().item()
    )


@pytest.mark.parametrize(
    ("grid", "width"), [((1, 1, 1), 4), ((1, 14, 14), 768), ((1, 3, 5), 12), ((4, 2, 3), 8)]
)
def test_fixed_positions_by_place_are_the_second_implementations(grid, width):
    torch.testing.assert_close(
        sincos_positions(grid, width), second.place_table(grid, width), rtol=0, atol=1e-7
    )


def test_fixed_positions_of_later_frames_repeat_places_and_differ_in_time():
    table = sincos_positions((3, 2, 4), 16).reshape(3, 8, 16)
    assert torch.equal(table[0], sincos_positions((1, 2, 4), 16))
    steps = table[1:] - table[:-1]
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=0, atol=1e-6)
    assert (steps.abs().amax(dim=(1, 2)) > 0.1).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("kind", "choice"), CHOICES)
def test_positions_of_any_grid_follow_the_definition(kind, choice, grid):
    model = shaken(VideoMAE(replace(BASE, positions=kind, resize_positions=choice)).double())
    for part in (model.encoder, model.decoder):
        positions_ND, _ = part.positions(grid)
        assert_close(
            positions_ND,
            expected_positions(part, choice, grid),
            1e-6 if kind.startswith("sin") else 1e-12,
        )


@pytest.mark.parametrize("kind", ["learned", "separate"])
def test_learned_tables_get_their_gradient_through_the_interpolation(kind):
    model: Any = shaken(VideoMAE(replace(BASE, positions=kind)).double())
    grid = (5, 2, 6)
    weights = torch.randn(60, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tables = list(model.encoder.positions.parameters())
    ours = torch.autograd.grad((model.encoder.positions(grid)[0] * weights).sum(), tables)
    theirs = torch.autograd.grad(
        (expected_positions(model.encoder, "interpolate", grid) * weights).sum(), tables
    )
    for gradient, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        assert_close(gradient, other, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS[1:])
def test_a_clip_of_another_size_is_encoded_with_the_positions_of_its_grid(grid, dtype):
    """8 to 64 frames, other heights and widths, not square, of a model made for BASE."""
    encoder = shaken(Encoder(BASE)).to(dtype)
    clip = clip_of(grid)
    state = second.official_state(torch.nn.ModuleDict({"encoder": encoder}), (3, *BASE.tubelet))
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (BASE.mean, BASE.std))
    video = ((clip.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3).to(dtype)
    x = second.embed(video, state) - second.sinusoid_table(grid[0] * grid[1] * grid[2], 24).to(
        dtype
    )
    x = x + expected_positions(encoder, "interpolate", grid)
    x = second.norm(
        second.blocks(x, state, "encoder.blocks", BASE.depth, BASE.num_heads), state, "encoder.norm"
    )
    assert_close(encoder(clip), x, 1e-5)
    visible = torch.tensor([[0], [grid[0] * grid[1] * grid[2] - 1]])
    assert encoder(clip, visible).shape == (2, 1, 24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sides", [{"num_frames": 16}, {"height": 16, "width": 48}, {"num_frames": 2, "width": 8}]
)
def test_a_resized_model_computes_what_the_model_computes_on_such_clips(kind, sides):
    config = replace(BASE, positions=kind, class_tokens=1, drop_path=0.2)
    model = shaken(VideoMAE(config, ObjectiveConfig(contrastive_weight=0.2)).eval())
    other = resized(model, **sides)
    assert (other.config.num_frames, other.config.height, other.config.width) == tuple(
        sides.get(side, getattr(config, side)) for side in ("num_frames", "height", "width")
    )
    assert other.objective_config == model.objective_config
    assert not other.training
    clip, mask = clip_of(other.grid), tube_mask(torch.arange(2), other.grid, 0.5)
    assert torch.equal(other.encoder(clip), model.encoder(clip))
    for ours, theirs in zip(other(clip, mask), model(clip, mask, other.grid), strict=True):
        assert torch.equal(ours, theirs)
    back = resized(other, num_frames=config.num_frames, height=config.height, width=config.width)
    assert back.config == config
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items()
    )


@pytest.mark.parametrize(("kind", "choice"), CHOICES)
def test_a_resized_model_comes_back_from_its_folder(kind, choice, tmp_path):
    config = replace(BASE, positions=kind, resize_positions=choice)
    head = ClassifierConfig(num_classes=3, head_init_scale=1.0)
    model = resized(shaken(VideoClassifier(config, head)), num_frames=10, width=16).eval()
    save_model_folder(tmp_path / "model", model)
    loaded = load_pretrained(tmp_path / "model", VideoClassifier)
    assert loaded.config == model.config
    assert loaded.config.position_grid == BASE.grid
    assert torch.equal(loaded(clip_of(model.config.grid)), model(clip_of(model.config.grid)))


@pytest.mark.parametrize("predicted_frames", [None, 3])
def test_predictions_of_another_grid_have_its_tokens_and_a_gradient(predicted_frames):
    model = shaken(
        VideoMAE(
            replace(BASE, positions="separate", class_tokens=2, predicted_frames=predicted_frames)
        )
    )
    grid = (5, 2, 4)
    mask = tube_mask(torch.arange(2), grid, 0.6)
    output = model(clip_of(grid), mask, grid)
    assert output.predicted_BMP.shape == (2, mask.masked_BM.shape[1], model.config.predicted_values)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert resized(model, num_frames=10).config.predicted_frames == (
        None if predicted_frames is None else 5
    )


def test_a_mask_of_another_grid_than_the_clips_is_refused():
    model, grid = VideoMAE(BASE), (3, 3, 4)
    mask = tube_mask(torch.arange(2), grid, 0.5)
    with pytest.raises(
        ValueError,
        match=r"is \(6, 24, 32, 3\), the mask is of a clip of \(6, 24, 40, 3\); name the grid",
    ):
        model(clip_of(grid), mask)
    with pytest.raises(
        ValueError, match=r"is \(6, 24, 40, 3\), the mask is of a clip of \(6, 24, 32, 3\)"
    ):
        model(clip_of(BASE.grid), mask, grid)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 24, 40, 3),
        (2, 6, 20, 40, 3),
        (2, 6, 24, 44, 3),
        (2, 6, 24, 40, 1),
        (2, 0, 24, 40, 3),
        (6, 24, 40, 3),
    ],
)
def test_a_clip_that_has_no_grid_is_refused(shape):
    with pytest.raises(ValueError, match=r"multiples of \(2, 8, 8\) with 3 channels") as error:
        Encoder(BASE)(torch.zeros(shape, dtype=torch.uint8))
    assert str(tuple(shape[1:])) in str(error.value)


def test_fixed_positions_of_a_grid_are_made_once():
    positions = Positions(BASE, 24)
    assert positions(BASE.grid)[0] is positions.fixed_ND
    with torch.inference_mode():
        first = positions((4, 4, 4))[0]
    assert positions((4, 4, 4))[0] is first
    assert not first.is_inference()
    made = _remembered_positions.cache_info().misses
    positions((4, 4, 4))
    assert _remembered_positions.cache_info().misses == made


@pytest.mark.parametrize("kind", ["sinusoid", "separate"])
def test_another_grid_compiles_as_one_graph(kind):
    encoder = shaken(Encoder(replace(BASE, positions=kind, class_tokens=1)))
    clip = clip_of((2, 4, 3))
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(compiled(clip), encoder(clip), 1e-5)


def test_interpolation_under_autocast_is_exact():
    table = torch.randn(45, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        ours = interpolate_positions(table, (3, 3, 5), (4, 6, 2))
    assert torch.equal(ours, interpolate_positions(table, (3, 3, 5), (4, 6, 2)))
    half = interpolate_positions(table.bfloat16(), (3, 3, 5), (4, 6, 2))
    assert half.dtype == torch.bfloat16
    assert_close(half, ours, 0.02)


def test_fixed_positions_are_in_no_folder_and_learned_ones_do_not_decay():
    fixed, learned = (
        VideoMAE(replace(BASE, positions=kind, class_tokens=1)) for kind in ("sincos", "separate")
    )
    assert not any("positions" in name for name in fixed.state_dict())
    names = {id(parameter): name for name, parameter in learned.named_parameters()}
    decaying = {
        names[id(p)]
        for group in parameter_groups(learned, 0.05)
        if group["weight_decay"] > 0
        for p in group["params"]
    }
    assert "encoder.blocks.0.mlp.0.weight" in decaying
    assert not any("positions" in name or "token" in name for name in decaying)
    assert sum(".positions." in name for name in names.values()) == 6


def test_a_folder_from_before_these_options_is_read_as_it_was(tmp_path):
    model = shaken(VideoMAE(BASE)).eval()
    save_model_folder(tmp_path / "model", model)
    path = tmp_path / "model" / "config.json"
    description = json.loads(path.read_text())
    old = (
        "in_channels",
        "num_frames",
        "height",
        "width",
        "tubelet_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "decoder_embed_dim",
        "decoder_depth",
        "decoder_num_heads",
        "decoder_mlp_ratio",
        "drop_path",
        "mean",
        "std",
    )
    description["model"] = {key: description["model"][key] for key in old}
    del description["objective"]["pixels"]
    path.write_text(json.dumps(description))
    loaded = load_pretrained(tmp_path / "model", VideoMAE)
    assert (loaded.config, loaded.objective_config) == (model.config, model.objective_config)
    clip, mask = clip_of(BASE.grid), tube_mask(torch.arange(2), BASE.grid, 0.5)
    assert torch.equal(loaded(clip, mask).predicted_BMP, model(clip, mask).predicted_BMP)
    # the names that folders had: none may change
    block = {
        f"{layer}.{kind}"
        for layer in ("norm1", "attn.proj", "norm2", "mlp.0", "mlp.2")
        for kind in ("weight", "bias")
    }
    block |= {f"attn.qkv.{name}" for name in ("weight", "q_bias", "v_bias")}
    expected = {f"{side}.blocks.0.{name}" for side in ("encoder", "decoder") for name in block}
    expected |= {
        f"{layer}.{kind}"
        for layer in ("encoder.patch_embed", "encoder.norm", "decoder.norm", "decoder.head")
        for kind in ("weight", "bias")
    }
    assert set(model.state_dict()) == expected | {
        "decoder.encoder_to_decoder.weight",
        "decoder.mask_token",
    }


def test_the_bias_of_the_keys_is_kept_and_changes_no_output(tmp_path):
    model: Any = shaken(VideoMAE(replace(BASE, qkv_bias="qkv"))).eval()
    save_model_folder(tmp_path / "model", model)
    loaded: Any = load_pretrained(tmp_path / "model", VideoMAE)
    assert torch.equal(
        loaded.encoder.blocks[0].attn.qkv.k_bias, model.encoder.blocks[0].attn.qkv.k_bias
    )
    clip = clip_of(BASE.grid)
    tokens = model.encoder(clip)
    model.encoder.blocks[0].attn.qkv.k_bias.data += 1.0
    assert_close(model.encoder(clip), tokens, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "sincos", "embed_dim": 18}, "^embed_dim: 18 must be a multiple of 4"),
        (
            {"positions": "sincos", "decoder_embed_dim": 18},
            "^decoder_embed_dim: 18 must be a multiple of 4",
        ),
        ({"position_grid": (3, 0, 5)}, "^position_grid"),
        ({"class_tokens": -1}, "^class_tokens: -1 must be at least 0"),
        ({"norm_eps": 0.0}, "^norm_eps: 0.0 must be above 0"),
        ({"head_norm_eps": 1.0}, "^head_norm_eps: 1.0 must be above 0, below 1"),
        ({"layer_scale": -0.1}, "^layer_scale: -0.1 must be at least 0"),
        (
            {"predicted_frames": 4},
            "^predicted_frames: 4 must be a multiple of the 3 frames of tokens",
        ),
        ({"predicted_frames": 9}, "^predicted_frames: 9 must be a multiple"),
        ({"predicted_frames": 0}, "^predicted_frames: 0 must be a multiple"),
    ],
)
def test_an_option_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


def test_tables_are_made_for_the_grid_that_the_configuration_names():
    config = replace(BASE, positions="learned", position_grid=(2, 4, 4))
    model: Any = shaken(VideoMAE(config))
    assert model.encoder.positions.table.shape == (32, 24)
    assert_close(
        model.encoder.positions(BASE.grid)[0],
        expected_positions(model.encoder, "interpolate", BASE.grid, (2, 4, 4)),
        1e-5,
    )
    assert torch.equal(model.encoder.positions((2, 4, 4))[0], model.encoder.positions.table)
    fixed = replace(BASE, position_grid=(2, 4, 4))
    table = interpolate_positions(
        computed_positions("sinusoid", (2, 4, 4), 24), (2, 4, 4), BASE.grid
    )
    assert torch.equal(Positions(fixed, 24)(BASE.grid)[0], table)
    anew = replace(fixed, resize_positions="compute")
    assert torch.equal(
        Positions(anew, 24)(BASE.grid)[0], computed_positions("sinusoid", BASE.grid, 24)
    )
