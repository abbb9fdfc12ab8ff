"""The recipes load, reproduce the published learning rates and lengths, and tell how to run them;
the documents name what exists.
"""

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from video_mae.config import AugmentConfig, FinetuneConfig, ModelConfig, PretrainConfig, load_config
from video_mae.config.schema import flatten
from video_mae.model.masking import mask_counts
from video_mae.training.optim import make_schedule
from video_mae.training.stages import clip_stages

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = sorted((REPOSITORY / "configs" / "pretrain").glob("*.yaml"))
PUBLISHED = [path for path in PRETRAIN if path.stem != "demo"]
FINETUNE = sorted((REPOSITORY / "configs" / "finetune").glob("*.yaml"))
FINETUNE_PUBLISHED = [path for path in FINETUNE if path.stem not in ("demo", "own_videos_base")]
DOCUMENTS = sorted((REPOSITORY / "docs").glob("*.md"))

# name: videos of the list, videos a step, (V, M), peak and final learning rate, warm-up steps,
# steps; by hand from the sources' scripts, whose epochs are so many whole steps as the list fills.
# 240,000 stands for Kinetics-400, of which everybody has another part; the lists of the others are
# fixed or named by their authors.
BY_HAND = {
    "kinetics400_small": (240_000, 1024, (160, 1408), 6e-4, 4e-5, 9_360, 374_400),
    "kinetics400_base": (240_000, 2048, (160, 1408), 1.2e-3, 8e-5, 4_680, 93_600),
    "kinetics400_base_contrastive": (240_000, 2048, (160, 1408), 1.2e-3, 8e-5, 4_680, 93_600),
    "kinetics400_large": (240_000, 512, (160, 1408), 3e-4, 2e-5, 18_720, 748_800),
    "kinetics400_huge": (240_000, 1024, (160, 1408), 6e-4, 4e-5, 9_360, 374_400),
    "ssv2_base": (168_913, 2048, (160, 1408), 1.2e-3, 8e-5, 3_280, 65_600),
    "ucf101_base": (9_537, 192, (392, 1176), 2.25e-4, 7.5e-6, 1_960, 156_800),
    "v2_base_dual": (1_350_000, 1024, (160, 704), 4e-3, 4e-5, 26_360, 263_600),
    "v2_giant_dual": (1_350_000, 2048, (208, 920), 4.8e-3, 8e-5, 19_770, 197_700),
    "mae_image_base": (1_281_167, 4096, (49, 147), 2.4e-3, 0.0, 12_480, 249_600),
    "mae_image_large": (1_281_167, 4096, (49, 147), 2.4e-3, 0.0, 12_480, 249_600),
    "mae_st_large": (240_000, 128, (156, 1412), 8e-4, 0.0, 9_375, 187_500),
    "joint_image_video_base": (
        1_281_167 + 168_913,
        2048,
        (160, 1408),
        1.6e-3,
        0.0,
        28_321,
        566_437,
    ),
    "remote_sensing_base": (712_874, 4096, (36, 108), 1.6e-3, 0.0, 3_480, 34_800),
    # 10,000 stands for one's own videos
    "continue_on_own_videos": (10_000, 256, (160, 1408), 7.5e-5, 1e-5, 195, 3_906),
    "features_two_stage_base": (240_000, 1024, (160, 1408), 6e-4, 4e-5, 9_375, 93_750),
    "contrastive_features_base": (240_000, 1024, (160, 1408), 6e-4, 4e-5, 9_375, 93_750),
    "volume_base": (18, 6, (54, 162), 1.5e-4, 0.0, 300, 30_000),
}


# name: videos, videos a step, clips a video, peak and final learning rate, warm-up steps, steps,
# layer decay, drop path, dropout before the head, sampling, flip, classes; by hand from the
# sources' scripts. 650,000 stands for Kinetics-710.
FINETUNED_BY_HAND = {
    "kinetics400_small": (
        240_000,
        384,
        2,
        7.5e-4,
        1.5e-6,
        3_125,
        93_750,
        0.75,
        0.1,
        0.0,
        "dense",
        True,
        400,
    ),
    "kinetics400_base": (
        240_000,
        512,
        1,
        2e-3,
        2e-6,
        2_340,
        46_800,
        0.75,
        0.1,
        0.0,
        "dense",
        True,
        400,
    ),
    "kinetics400_large": (
        240_000,
        128,
        2,
        1e-3,
        5e-7,
        9_375,
        65_625,
        0.75,
        0.1,
        0.0,
        "dense",
        True,
        400,
    ),
    "kinetics400_huge": (
        240_000,
        512,
        2,
        2e-3,
        2e-5,
        2_340,
        23_400,
        0.75,
        0.2,
        0.5,
        "dense",
        True,
        400,
    ),
    "ssv2_small": (
        168_913,
        384,
        2,
        1.5e-3,
        1.5e-6,
        2_195,
        17_560,
        0.7,
        0.1,
        0.0,
        "parts",
        False,
        174,
    ),
    "ssv2_base": (168_913, 512, 1, 1e-3, 2e-6, 1_645, 16_450, 0.75, 0.1, 0.0, "parts", False, 174),
    "ucf101_base": (9_537, 128, 2, 2.5e-4, 5e-6, 370, 7_400, 0.7, 0.2, 0.5, "dense", True, 101),
    "ucf101_lora_base": (9_537, 64, 1, 5e-4, 2.5e-7, 745, 7_450, 1, 0, 0, "dense", True, 101),
    "v2_giant_k710": (
        650_000,
        96,
        2,
        3.75e-4,
        3.75e-7,
        33_850,
        236_950,
        0.9,
        0.3,
        0.0,
        "dense",
        True,
        710,
    ),
}


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def command(path: Path) -> list[str]:
    match = re.search(r"^Command: (.*)$", header(path), re.MULTILINE)
    assert match, f"{path.name} has no Command"
    return shlex.split(match[1])


def num_gpus(path: Path) -> int:
    words = command(path)
    return int(words[words.index("--num_gpus") + 1])


def named(path: Path) -> Any:
    return pytest.param(path, id=path.stem)


@pytest.mark.parametrize("path", map(named, PRETRAIN))
def test_a_recipe_loads(path: Path) -> None:
    config = load_config(path, schema=PretrainConfig)
    assert config.output.startswith("runs/")
    assert config.data.source or config.data.sources


@pytest.mark.parametrize("path", map(named, FINETUNE))
def test_a_recipe_of_fine_tuning_loads(path: Path) -> None:
    config = load_config(path, schema=FinetuneConfig)
    assert config.output.startswith("runs/")
    assert config.data.source
    assert config.validation.source
    assert config.checkpoint


@pytest.mark.parametrize(
    "path",
    [
        *map(named, PUBLISHED),
        *(pytest.param(path, id=f"finetune_{path.stem}") for path in FINETUNE_PUBLISHED),
    ],
)
def test_a_header_tells_source_result_hardware_batch_and_command(path: Path) -> None:
    for key in ("Source", "Expected", "Hardware", "Batch", "Command"):
        assert len(re.findall(rf"^{key}: \S", header(path), re.MULTILINE)) == 1, key


@pytest.mark.parametrize("path", map(named, PUBLISHED))
def test_the_command_of_a_recipe_starts_this_very_file_into_a_folder_of_its_own(path: Path) -> None:
    words = command(path)
    assert words[0] == "deepspeed"
    assert words[-4:] == ["--module", "video_mae", "pretrain", str(path.relative_to(REPOSITORY))]
    assert load_config(path).output == f"runs/{path.stem}"


def test_every_published_recipe_is_checked_by_hand() -> None:
    assert {path.stem for path in PUBLISHED} == set(BY_HAND)


@pytest.mark.parametrize("path", map(named, PUBLISHED))
def test_the_command_reaches_the_published_batch_rate_length_and_mask(path: Path) -> None:
    num_videos, batch, counts, peak, final, warmup, steps = BY_HAND[path.stem]
    config = load_config(path)
    assert config.optim.micro_batch * config.optim.accumulation * num_gpus(path) == batch
    schedule, line = make_schedule(
        config.optim, num_videos, num_gpus(path), config.data.clips_per_video
    )
    assert schedule.peak_lr == pytest.approx(peak)
    assert schedule.final_lr == pytest.approx(final)
    assert (schedule.warmup_steps, schedule.total_steps) == (warmup, steps)
    assert f"global batch {batch} / 256" in line
    assert (
        mask_counts(
            config.model.grid, config.mask.kind, config.mask.ratio, config.mask.decoder_mask_ratio
        )
        == counts
    )
    assert re.search(rf"^Batch: {batch} (videos|images|volumes)\b", header(path), re.MULTILINE)


@pytest.mark.parametrize("path", map(named, PUBLISHED))
def test_the_overrides_that_a_header_offers_are_accepted(path: Path) -> None:
    offers = re.findall(r"`([\w.]+=[^`]+)`", header(path))
    assert offers
    for offer in offers:
        load_config(path, offer.split())


def test_the_stages_that_a_recipe_shows_can_be_and_take_its_steps() -> None:
    path = REPOSITORY / "configs" / "pretrain" / "kinetics400_base.yaml"
    shown = re.search(r"^# (optim: .*)\Z", path.read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    values = yaml.safe_load(shown[1].replace("\n# ", "\n"))
    changes = [f"{key}={yaml.safe_dump(value)}" for key, value in values.items()]
    ours, config = load_config(path), load_config(path, changes)
    schedule, _ = make_schedule(config.optim, BY_HAND[path.stem][0], num_gpus(path), 1)
    before, _ = make_schedule(ours.optim, BY_HAND[path.stem][0], num_gpus(path), 1)
    assert (schedule.total_steps, schedule.peak_lr) == (before.total_steps, before.peak_lr)
    _, small, whole = clip_stages(config, schedule.total_steps)
    assert (small.num_visible, small.num_masked) == (4 * 13, 4 * 51)
    assert whole.config.model == config.model
    assert schedule.lr(whole.first_step) == schedule.peak_lr > schedule.lr(whole.first_step + 1)


@pytest.mark.parametrize("path", map(named, PUBLISHED))
def test_the_overrides_for_another_number_of_gpus_keep_the_batch(path: Path) -> None:
    offers = re.findall(r"`(optim\.[^`]+)` on (\d+)", header(path))
    assert offers
    for offer, gpus in offers:
        optim = load_config(path, offer.split()).optim
        assert optim.micro_batch * optim.accumulation * int(gpus) == BY_HAND[path.stem][1], offer


@pytest.mark.parametrize("name", ["v2_base_dual", "v2_giant_dual"])
def test_counting_clips_with_the_base_rate_of_the_header_gives_the_same_schedule(name: str) -> None:
    path = REPOSITORY / "configs" / "pretrain" / f"{name}.yaml"
    match = re.search(r"`(optim\.lr_counts_clips=true [^`]+)`", header(path))
    assert match
    overrides = match[1].split()
    by_videos, by_clips = (
        make_schedule(load_config(path, more).optim, 1_350_000, 8, 4)[0] for more in ([], overrides)
    )
    assert by_clips.peak_lr == pytest.approx(by_videos.peak_lr)
    assert by_clips.final_lr == pytest.approx(by_videos.final_lr)


def test_the_contrastive_recipe_is_the_base_recipe_with_another_objective() -> None:
    folder = REPOSITORY / "configs" / "pretrain"
    base, ours = (
        flatten(load_config(folder / f"kinetics400_base{more}.yaml"))
        for more in ("", "_contrastive")
    )
    assert {key for key in base if base[key] != ours[key]} == {
        "output",
        "objective.contrastive_weight",
    }
    assert ours["objective.contrastive_weight"] > 0


VIDEOMAE = {
    "kinetics400_small",
    "kinetics400_base",
    "kinetics400_base_contrastive",
    "kinetics400_large",
    "kinetics400_huge",
    "ssv2_base",
    "ucf101_base",
    "v2_base_dual",
    "v2_giant_dual",
}
MAE = {"mae_image_base", "mae_image_large", "mae_st_large", "remote_sensing_base", "volume_base"}


@pytest.mark.parametrize("path", map(named, PUBLISHED))
def test_a_recipe_counts_draws_and_decays_as_its_source_does(path: Path) -> None:
    config = load_config(path)
    assert (config.mask.kind == "random_kept") == config.optim.decay_tokens == (path.stem in MAE)
    assert config.data.reach_end == (path.stem not in VIDEOMAE)
    assert config.optim.drop_last_batch == (path.stem in VIDEOMAE | MAE - {"volume_base"})


def test_every_published_recipe_of_fine_tuning_is_checked_by_hand() -> None:
    assert {path.stem for path in FINETUNE_PUBLISHED} == set(FINETUNED_BY_HAND)


@pytest.mark.parametrize("path", map(named, FINETUNE_PUBLISHED))
def test_the_command_of_a_fine_tuning_starts_this_very_file_after_its_pretraining(
    path: Path,
) -> None:
    words, config = command(path), load_config(path, schema=FinetuneConfig)
    assert words[0] == "deepspeed"
    assert words[-4:] == ["--module", "video_mae", "finetune", str(path.relative_to(REPOSITORY))]
    assert config.output == f"runs/{path.stem}_finetuned"
    pretrained = Path(config.checkpoint).name
    assert (
        REPOSITORY / "configs" / "pretrain" / f"{pretrained}.yaml"
    ).exists() or f"output=runs/{pretrained}" in header(path)


@pytest.mark.parametrize("path", map(named, FINETUNE_PUBLISHED))
def test_a_fine_tuning_has_the_published_numbers(path: Path) -> None:
    num_videos, batch, clips, peak, final, warmup, steps, *others = FINETUNED_BY_HAND[path.stem]
    config = load_config(path, schema=FinetuneConfig)
    optim, data, head = config.optim, config.data, config.classifier
    assert optim.micro_batch * optim.accumulation * num_gpus(path) == batch
    schedule, line = make_schedule(optim, num_videos, num_gpus(path), data.clips_per_video)
    assert (schedule.peak_lr, schedule.final_lr) == (pytest.approx(peak), pytest.approx(final))
    assert (schedule.warmup_steps, schedule.total_steps) == (warmup, steps)
    assert f"global batch {batch} / 256" in line
    assert re.search(rf"^Batch: {batch} videos", header(path), re.MULTILINE)
    assert [
        optim.layer_decay,
        config.model.drop_path,
        head.head_dropout,
        head.sampling,
        data.flip,
        head.num_classes,
    ] == others
    assert (data.clips_per_video, optim.betas, head.head_init_scale, head.pooling) == (
        clips,
        (0.9, 0.999),
        0.001,
        "mean",
    )
    assert (data.crop, data.crop_scales) == ("random_resized", (0.08, 1.0))
    # rand-m7-n4-mstd0.5-inc1, and the rest of the common recipe
    assert config.augment == AugmentConfig(
        randaugment_ops=4,
        randaugment_magnitude=7.0,
        randaugment_std=0.5,
        erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        mix_probability=1.0,
        switch_probability=0.5,
        label_smoothing=0.1,
    )
    assert (head.antialias, optim.drop_last_batch, optim.decay_tokens) == (False, True, False)
    is_giant = path.stem == "v2_giant_k710"
    assert (optim.weight_decay, optim.clip_grad) == ((0.1, 5.0) if is_giant else (0.05, 0.0))


@pytest.mark.parametrize("path", map(named, FINETUNE_PUBLISHED))
def test_the_overrides_that_a_fine_tuning_offers_are_accepted_and_keep_the_batch(
    path: Path,
) -> None:
    text = " ".join(header(path).split())
    offers = re.findall(r"`([\w.]+=[^`]+)`", text)
    assert offers
    for offer in offers:
        load_config(path, offer.split(), FinetuneConfig)
    gpus = re.findall(r"`(optim\.accumulation=\d+)` on (\d+)", text)
    assert gpus
    for offer, number in gpus:
        optim = load_config(path, [offer], FinetuneConfig).optim
        assert (
            optim.micro_batch * optim.accumulation * int(number) == FINETUNED_BY_HAND[path.stem][1]
        ), offer


def test_a_fine_tuning_takes_the_architecture_that_its_pretraining_made() -> None:
    for path in FINETUNE:
        config = load_config(path, schema=FinetuneConfig)
        source = REPOSITORY / "configs" / "pretrain" / f"{Path(config.checkpoint).name}.yaml"
        if source.exists():
            assert replace(config.model, drop_path=0.0) == load_config(source).model, path.stem


@pytest.mark.parametrize("path", map(named, DOCUMENTS))
def test_a_document_names_functions_that_exist(path: Path) -> None:
    for name in re.findall(r"`(video_mae(?:\.\w+)+)`", path.read_text()):
        assert resolves(name), f"{path.name}: `{name}` does not exist"


def resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_the_objective_document_names_keys_that_exist() -> None:
    sections = "|".join({key.split(".")[0] for key in flatten(PretrainConfig()) if "." in key})
    keys = re.findall(
        rf"`((?:{sections})\.\w+)`", (REPOSITORY / "docs" / "objective.md").read_text()
    )
    assert "objective.contrastive_weight" in keys
    assert set(keys) <= set(flatten(PretrainConfig()))


def test_the_objective_document_counts_tokens_as_the_masks_do() -> None:
    rows = re.findall(
        r"^\| (\d+) x (\d+) x (\d+) \| (\d+) x (\d+) x \d+ \| (\w+) ([\d.]+)(?:, "
        r"decoder ([\d.]+))? "
        r"\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$",
        (REPOSITORY / "docs" / "objective.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 7
    for frames, height, width, tubelet, patch, kind, ratio, skipped, *expected in rows:
        model = ModelConfig(
            num_frames=int(frames),
            height=int(height),
            width=int(width),
            tubelet_size=int(tubelet),
            patch_size=int(patch),
        )
        counts = mask_counts(model.grid, kind, float(ratio), float(skipped or 0))
        assert [model.num_tokens, model.tubelet_values, *counts] == [
            int(number) for number in expected
        ]


def test_the_recipe_for_own_videos_is_what_its_header_says() -> None:
    path = REPOSITORY / "configs" / "finetune" / "own_videos_base.yaml"
    config = load_config(path, schema=FinetuneConfig)
    schedule, line = make_schedule(config.optim, 320, 1, config.data.clips_per_video)
    assert schedule.peak_lr == pytest.approx(1.25e-4)
    assert (schedule.warmup_steps, schedule.total_steps) == (60, 600)
    assert "global batch 16 / 256" in line
    text = header(path)
    assert re.search(r"^Batch: 16 videos a step; peak rate .* = 1.25e-4", text, re.MULTILINE)
    for offer in re.findall(r"`([\w.]+=[^`.]+)`", text):
        load_config(path, offer.split(), FinetuneConfig)
    assert command(path)[:4] == [
        "video-mae",
        "finetune",
        str(path.relative_to(REPOSITORY)),
        *command(path)[3:4],
    ]
