"""A recipe over its base, and a step of a given number of videos, cut for the ranks that there are."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from video_mae.config import FinetuneConfig, OptimConfig, PretrainConfig, load_config
from video_mae.config.schema import save_config


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "size", "accumulation"),
    [
        (2048, 32, 64, 32, 1),
        (2048, 32, 1, 32, 64),
        (2048, 32, 128, 16, 1),
        (96, 3, 8, 3, 4),
        (96, 5, 2, 4, 12),  # 5 does not divide 48
        (26, 8, 2, 1, 13),  # only 1 and 13 do
        (26, 13, 2, 13, 1),
        (3, 32, 3, 1, 1),
    ],
)
def test_a_step_is_cut_into_the_largest_micro_batches_that_divide_it(
    batch, most, ranks, size, accumulation
):
    optim = OptimConfig(global_batch=batch, micro_batch=most, accumulation=7)
    cut = optim.cut_for(ranks)
    assert (cut.micro_batch, cut.accumulation) == (size, accumulation)
    assert cut.micro_batch * cut.accumulation * ranks == batch
    assert cut.cut_for(ranks) == cut
    assert replace(cut, micro_batch=most, accumulation=7) == optim


def test_without_a_global_batch_a_configuration_means_what_it_did():
    optim = OptimConfig(micro_batch=5, accumulation=3)
    assert optim.cut_for(7) is optim


@pytest.mark.parametrize(
    ("batch", "ranks", "batches", "counts"),
    [
        (2048, 3, "2046 or 2049", "2 or 4"),
        (2048, 24, "2040 or 2064", "16 or 32"),
        (96, 7, "91 or 98", "6 or 8"),
        (2, 8, "8 or 16", "1 or 2"),
        (7, 2, "6 or 8", "1 or 7"),
    ],
)
def test_what_cannot_be_cut_says_which_numbers_could(batch, ranks, batches, counts):
    with pytest.raises(ValueError, match=r"^optim.global_batch: ") as error:
        OptimConfig(global_batch=batch).cut_for(ranks)
    line = str(error.value)
    assert f"{ranks} ranks; {batches} are, or start {counts} ranks" in line
    for number in map(int, re.findall(r"\d+", batches)):
        OptimConfig(global_batch=number).cut_for(ranks)
    for number in map(int, re.findall(r"\d+", counts)):
        OptimConfig(global_batch=batch).cut_for(number)


def test_a_clip_that_is_left_alone_by_the_cut_cannot_be_mixed(monkeypatch):
    config = FinetuneConfig(optim=OptimConfig(global_batch=4))
    assert config.cut().optim.micro_batch == 4
    for name, value in zip(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
        ("0", "4", "0", "127.0.0.1", "29500"),
        strict=True,
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"optim.micro_batch: 1 clip has no other to be mixed"):
        config.cut()


def files(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "recipe.yaml"


BASE = "output: runs/base\nmodel: {preset: small, decoder_depth: 5}\noptim: {base_lr: 0.1, epochs: 9, warmup_epochs: 1}\n"


def test_a_recipe_states_what_differs_from_its_base_and_the_run_folder_all(tmp_path, monkeypatch):
    recipe = files(
        tmp_path,
        base=BASE,
        recipe="base: base.yaml\nmodel: {preset: large}\noptim: {epochs: 3}\n",
    )
    monkeypatch.chdir("/")  # the base is beside the recipe, wherever one is
    config = load_config(recipe, ["optim.warmup_epochs=2"])
    whole = load_config(tmp_path / "base.yaml")
    assert (config.output, config.optim.base_lr) == ("runs/base", 0.1)
    assert (config.optim.epochs, config.optim.warmup_epochs) == (3, 2)
    assert (config.model.embed_dim, config.model.decoder_embed_dim) == (1024, 512)
    assert config.model.decoder_depth == whole.model.decoder_depth == 5  # a key, not of the preset
    save_config(config, tmp_path / "config.yaml")
    assert "base:" not in (tmp_path / "config.yaml").read_text()
    (tmp_path / "base.yaml").unlink()
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (
            {"recipe": "base: other.yaml\n"},
            FileNotFoundError,
            r"recipe.yaml: base: .*other.yaml: no such configuration file",
        ),
        ({"recipe": "base: null\n"}, ValueError, r"recipe.yaml: base: null is not a text"),
        (
            {"recipe": "base: base.yaml\n", "base": "base: third.yaml\n"},
            ValueError,
            r"recipe.yaml: .*base.yaml: base: is itself the base of .*recipe.yaml, and may not",
        ),
        (
            {"recipe": "base: recipe.yaml\n"},
            ValueError,
            r"recipe.yaml: base: is itself the base of",
        ),
        (
            {"recipe": "base: base.yaml\n", "base": "optim: {base_lt: 1}\n"},
            ValueError,
            r"recipe.yaml: .*base.yaml: unknown key optim.base_lt",
        ),
        (
            {"recipe": "base: base.yaml\noptim: {base_lt: 1}\n", "base": BASE},
            ValueError,
            r"recipe.yaml: unknown key optim.base_lt",
        ),
        (
            {"recipe": "base: base.yaml\n", "base": "optim: [\n"},
            ValueError,
            r"recipe.yaml: .*base.yaml: line 2",
        ),
        ({"recipe": "base: [base.yaml]\n"}, ValueError, r"recipe.yaml: base: .* is not "),
    ],
)
def test_a_base_that_is_none_is_one_line(tmp_path, texts, error, message):
    with pytest.raises(error, match=message) as found:
        load_config(files(tmp_path, **texts))
    assert "\n" not in str(found.value)


def test_a_base_is_no_key_of_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="unknown key base"):
        load_config(files(tmp_path, recipe=BASE), ["base=base.yaml"])


def test_a_stage_of_another_number_of_videos_needs_a_batch_of_micro_batches(
    tiny: Callable[..., PretrainConfig],
):
    from video_mae.training.stages import clip_stages

    config = tiny("optim.global_batch=4", "stages.a={from_step: 2, micro_batch: 2}")
    with pytest.raises(ValueError, match=r"stages.a.micro_batch: 2 needs .* no optim.global_batch"):
        clip_stages(config.cut())


def test_a_stage_without_a_file_of_its_own_takes_one_by_config(tmp_path, capsys):
    from video_mae.cli import main

    file = tmp_path / "views.yaml"
    file.write_text("num_clips: 2\nnum_cropps: 1\n")
    for words in (["evaluate", "model", "list"], ["probe", "model"]):
        with pytest.raises(SystemExit):
            main([*words, "--config", str(file), "precision=bf16"])
        error = capsys.readouterr().err
        assert f"{file}: unknown key num_cropps (did you mean num_crops?)" in error
    (tmp_path / "demo.yaml").write_text("train_clips: 8\nvalidation_clips: 8\nnum_frames: 2\n")
    size = ["height=32", "width=32"]
    with pytest.raises(SystemExit) as done:
        main(["demo", str(tmp_path / "data"), "--config", str(tmp_path / "demo.yaml"), *size])
    assert done.value.code == 0
    assert len((tmp_path / "data" / "train.txt").read_text().splitlines()) == 8
