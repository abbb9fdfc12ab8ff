# Letters: N B clips, T frames, H W pixels, C channels, K shapes, R pixels of a stencil, M crops, D
# features.
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import accuracy_report
import numpy as np
import pytest
import shapes
import skimage
import torch
import trials
from accuracy_report import findings, margins, standard_error
from clips import SUBJECTS, photographs, random_crop, recolour
from pretraining_helps import best_from_scratch, main
from shapes import SHAPES, ShapeClipsConfig, render_clip, render_clips, stencils
from trials import COMPARED, ExperimentConfig, Job, labelled_clips, scored_clips

from video_mae import load_pretrained
from video_mae.tools.demo import PHOTOGRAPH_SIDES, PHOTOGRAPHS, load_photograph

TOY = [
    "subject=shapes",
    "labels_per_class=[1,2]",
    "seeds=[3]",
    "unlabelled_clips=24",
    "scored_per_class=4",
    "steps=14",
    "warmup_steps=2",
    "batch=4",
    "finetune_batch=4",
    "repeated=[pixels,features]",
    "scratch_steps=[2,3]",
    "scratch_lrs=[2e-3]",
    "save_interval=4",
    "log_interval=2",
    "workers=1",
]
PRETRAININGS = [
    *((arm, 0) for arm in COMPARED),
    ("pixels", 1),
    ("features", 1),
]
SMALL = ShapeClipsConfig(num_frames=3)
NAMES = PHOTOGRAPHS["train"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of toy size."""
    folder, threads = tmp_path_factory.mktemp("experiment") / "run", torch.get_num_threads()
    assert main([f"output={folder}", *TOY]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch, quiet_process: None) -> list[float]:
    """The learning rates of all steps that are taken from now on."""
    taken, step = [], trials.take_step
    monkeypatch.setattr(
        trials,
        "take_step",
        lambda optimizer, loss, lr: (taken.append(lr), step(optimizer, loss, lr)),
    )
    return taken


def test_a_clip_is_a_function_of_seed_stream_and_index() -> None:
    clips_NTHWC, label_N = render_clips(NAMES, 2, 11, SMALL)
    again_NTHWC, again_label_N = render_clips(NAMES, 2, 5, SMALL)
    assert clips_NTHWC.shape == (11, 3, 40, 40, 3)
    assert torch.equal(clips_NTHWC[:5], again_NTHWC)
    assert torch.equal(label_N[:5], again_label_N)
    others = [
        render_clips(NAMES, 3, 5, SMALL),
        render_clips(NAMES, 2, 5, ShapeClipsConfig(num_frames=3, seed=1)),
        (clips_NTHWC[5:10],),
    ]
    assert all((other[0] != again_NTHWC).flatten(1).any(1).all() for other in others)


def test_all_shapes_have_the_area_of_the_unit_disk_and_their_centroid_in_the_middle() -> None:
    stencil_KRR = stencils().double()
    pixel = 2 * shapes.STENCIL_REACH / stencil_KRR.shape[1]
    place_R = (torch.arange(stencil_KRR.shape[1]) + 0.5) * pixel - shapes.STENCIL_REACH
    area_K = stencil_KRR.sum((1, 2)) * pixel**2
    torch.testing.assert_close(area_K, torch.full_like(area_K, math.pi), rtol=0.01, atol=0)
    for along in (1, 2):
        assert (
            (stencil_KRR.sum(3 - along) * place_R).sum(1) * pixel**2 / area_K
        ).abs().max() < 0.01
    edge_KRR = stencil_KRR.clone()
    edge_KRR[:, 1:-1, 1:-1] = 0
    assert edge_KRR.abs().max() == 0
    # of any two shapes, an area of 0.25 is only in one
    assert torch.pdist(stencil_KRR.flatten(1)).min() * pixel > 0.5


def test_the_label_decides_the_shape_and_nothing_else() -> None:
    textures = [
        load_photograph(name, round(PHOTOGRAPH_SIDES[1] * SMALL.frame_side)) for name in NAMES[:3]
    ]
    for index in range(12):
        clips, next_draws = [], []
        for label in range(len(SHAPES)):
            random = np.random.default_rng([5, index])
            clips.append(render_clip(random, label, textures, SMALL))
            next_draws.append(random.random())
        clips_KTHWC = torch.stack(clips).float()
        assert len(set(next_draws)) == 1  # no label draws more or less than another
        differs_THW = (clips_KTHWC != clips_KTHWC[:1]).any(4).any(0)
        # all is alike but what lies in one shape and not in another
        assert 0.05 < differs_THW.float().mean() < 0.55
        assert differs_THW.flatten(1).any(1).all()


def test_half_of_the_clips_of_every_class_are_negatives() -> None:
    clips_NTHWC, label_N = render_clips(NAMES, 0, 480, ShapeClipsConfig(num_frames=1))
    # the background covers most of a clip
    is_pale_N = clips_NTHWC.float().flatten(1).median(1).values > 127.5
    assert torch.equal(label_N.bincount(), torch.full((8,), 60))
    for label in range(len(SHAPES)):
        assert (
            0.5 - 3.5 * 0.5 / math.sqrt(60)
            < is_pale_N[label_N == label].float().mean()
            < 0.5 + 3.5 * 0.5 / math.sqrt(60)
        )


@pytest.mark.parametrize("split", ["validation", "tuning"])
def test_figures_come_from_photographs_that_nothing_is_trained_on(
    split: Literal["validation", "tuning"], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExperimentConfig(
        subject="shapes",
        scored_on=split,
        labels_per_class=(1,),
        scored_per_class=1,
        unlabelled_clips=8,
        seed=77,
    )
    rendered: list[tuple[Sequence[str], Sequence[Any]]] = []

    def record(names: Sequence[str], *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rendered.append((names, rest))
        return shown.render(names, *rest)

    shown = SUBJECTS["shapes"]
    monkeypatch.setitem(SUBJECTS, "shapes", shown._replace(render=record))
    labelled_clips(config, 8, 0)
    labelled_clips(config, 8, 1)
    scored_clips(config)
    training, scoring = rendered
    assert training[1][0] != scoring[1][0]  # each has its own random numbers
    train, scored = photographs(split)
    assert training[0] == train
    assert (
        scoring[0]
        == scored
        == {"validation": PHOTOGRAPHS["val"], "tuning": ("coffee.png", "grass.png")}[split]
    )
    folder = Path(skimage.__file__).parent / "data"
    assert len({(folder / name).read_bytes() for name in (*train, *scored)}) == len(train) + len(
        scored
    )
    if split == "tuning":
        assert not set(PHOTOGRAPHS["val"]) & {*train, *scored}


def test_labelled_clips_are_balanced_nested_and_some_of_those_of_pretraining() -> None:
    config = ExperimentConfig(subject="shapes", labels_per_class=(1, 3), unlabelled_clips=48)
    clips_NTHWC, label_N = trials.training_clips(config)
    places = []
    for seed in (0, 1):
        more_NTHWC, more_label_N = labelled_clips(config, 24, seed)
        fewer_NTHWC, fewer_label_N = labelled_clips(config, 8, seed)
        assert torch.equal(more_NTHWC[:8], fewer_NTHWC)
        for some_label_N in (fewer_label_N, more_label_N):
            assert some_label_N.bincount().tolist() == [len(some_label_N) // 8] * 8
        is_same_NN = (more_NTHWC[:, None] == clips_NTHWC[None]).flatten(2).all(2)
        assert (is_same_NN.sum(1) == 1).all()
        place_N = is_same_NN.int().argmax(1)
        assert torch.equal(label_N[place_N], more_label_N)
        places.append(place_N.tolist())
    assert set(places[0]) != set(places[1])


def test_crops_and_colours_are_the_same_in_all_frames_and_leave_the_clip_recognisable() -> None:
    picture_BHWC = torch.randint(
        0, 256, (64, 40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    clips_BTHWC = picture_BHWC[:, None].repeat(1, 4, 1, 1, 1)
    cropped_BTHWC = random_crop(clips_BTHWC, np.random.default_rng(1), 32)
    assert cropped_BTHWC.shape == (64, 4, 32, 32, 3)
    corners = [
        [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.equal(picture_HWC[y : y + 32, x : x + 32], crop_HWC)
        ]
        for picture_HWC, crop_HWC in zip(picture_BHWC, cropped_BTHWC[:, 0], strict=True)
    ]
    assert all(len(found) == 1 for found in corners)
    # with 64 clips
    assert {y for [(y, _)] in corners} == {x for [(_, x)] in corners} == set(range(9))
    coloured_BTHWC = recolour(cropped_BTHWC, np.random.default_rng(2))
    assert (coloured_BTHWC == coloured_BTHWC[:, :1]).all()
    assert 0 <= coloured_BTHWC.min() < coloured_BTHWC.max() <= 1
    signs, sources = [], []
    for before_PC, after_PC in zip(
        cropped_BTHWC[:, 0].flatten(1, 2), coloured_BTHWC[:, 0].flatten(1, 2), strict=True
    ):
        correlation_CC = torch.corrcoef(torch.cat([before_PC.float(), after_PC], 1).T)[:3, 3:]
        source_C = correlation_CC.abs().argmax(0)
        assert source_C.sort().values.tolist() == [0, 1, 2]
        assert (correlation_CC.abs().max(0).values > 0.8).all()  # some is clamped
        # one sign a clip
        signs.append(correlation_CC[source_C, torch.arange(3)].sign().unique().item())
        sources.append(tuple(source_C.tolist()))
    assert 16 < signs.count(-1.0) < 48
    assert len(set(sources)) == 6


def test_a_run_writes_all_its_files_and_a_line_for_every_figure(toy: Path) -> None:
    first, *lines = lines_of(toy)
    assert first["photographs"]["scored"] == list(PHOTOGRAPHS["val"])
    assert {"config", "model", "device", "versions"} < first.keys()
    found = [
        (line["kind"], line["arm"], line["weights"], line["labels"], line["seed"]) for line in lines
    ]
    expected = [("pretrain", arm, weights, 0, 0) for arm, weights in PRETRAININGS]
    expected += [("search", "random", 0, labels, 0) for labels in (8, 16) for _ in range(2)]
    expected += [
        (kind, arm, weights, labels, seed)
        for kind in ("finetune", "probe")
        for arm, weights in (("random", 0), *PRETRAININGS)
        for labels in (8, 16)
        for seed in (3,)
    ]
    assert sorted(found) == sorted(expected)
    for line in lines:
        if line["kind"] == "pretrain":
            last = 28 if line["arm"] == "pixels_longer" else 14
            assert [step for step, _, _ in line["curve"]] == list(range(2, last + 1, 2))
            assert (line["curve"][-1][2] > 0) == line["arm"].endswith("contrastive")
        else:
            # of 32 clips
            assert all((32 * accuracy) % 1 == 0 for accuracy in line["top1"].values())
    rows = [line for line in (toy / "table.md").read_text().splitlines() if line.startswith("| f")]
    assert len(rows) == 21
    by_seed = [
        100 * line["top1"]["fine-tuned"]
        for line in lines
        if (line["kind"], line["arm"], line["labels"]) == ("finetune", "features", 16)
    ]
    error = float(np.std(by_seed, ddof=1)) / 2**0.5
    assert f"**{np.mean(by_seed):.1f}** ({error:.1f}, 2 seeds)" in rows[4]
    for picture in ("accuracy.png", "curves.png"):
        assert (toy / picture).stat().st_size > 10_000


def test_training_from_scratch_has_the_settings_that_were_best_on_the_tuning_photographs(
    toy: Path,
) -> None:
    _, *lines = lines_of(toy)
    for labels in (8, 16):
        score_of = {
            line["steps"]: line["top1"]["fine-tuned"]
            for line in lines
            if line["kind"] == "search" and line["labels"] == labels
        }
        assert set(score_of) == {2, 3}
        steps, lr = best_from_scratch(lines, labels)
        best = max(score_of.values())
        # of equals the fewest, whichever ended first
        fewest = min(steps for steps, score in score_of.items() if score == best)
        assert (steps, lr) == (fewest, 2e-3)
        assert best_from_scratch(lines[::-1], labels) == (steps, lr)
        used = {
            (line["steps"], line["lr"])
            for line in lines
            if (line["kind"], line["arm"], line["labels"]) == ("finetune", "random", labels)
        }
        assert used == {(steps, 2e-3)}
    config = ExperimentConfig(
        subject="shapes", labels_per_class=(1, 2), scored_per_class=4, scored_on="tuning"
    )
    job = Job("search", "random", labels=8, steps=3, lr=2e-3)
    [line] = [line for line in lines if Job(*(line[name] for name in Job._fields)) == job]
    # nothing of it comes from the photographs that give the figures
    config = dataclasses.replace(config, finetune_batch=4, unlabelled_clips=16)
    assert trials.finetune(config, job)["top1"] == line["top1"]


def test_readings_of_a_run_are_those_of_its_saved_model_on_unseen_clips(toy: Path) -> None:
    config = ExperimentConfig(
        subject="shapes", labels_per_class=(1, 2), scored_per_class=4, unlabelled_clips=24
    )
    clips_NTHWC, label_N = labelled_clips(config, 16, 3)
    unseen_NTHWC, unseen_label_N = scored_clips(config)
    whole_NTHWC, _ = render_clips(PHOTOGRAPHS["val"], 1, 32, ShapeClipsConfig())
    assert torch.equal(unseen_NTHWC, whole_NTHWC[:, :, 4:36, 4:36])
    encoder = load_pretrained(toy / "models" / "features_1").encoder
    random = np.random.default_rng([0, trials.CROPS, 3])
    with torch.no_grad():
        views = [
            encoder(recolour(random_crop(clips_NTHWC, random, 32), random)).mean(1)
            for _ in range(4)
        ]
        feature_ND = torch.stack(views).mean(0)
        unseen_ND = encoder(unseen_NTHWC).mean(1)
    mean_D, std_D = feature_ND.mean(0), feature_ND.std(0) + 1e-4
    cosine_NM = torch.nn.functional.cosine_similarity(
        ((unseen_ND - mean_D) / std_D)[:, None], ((feature_ND - mean_D) / std_D)[None], dim=2
    )
    correct = 0
    for cosine_M, label in zip(cosine_NM.tolist(), unseen_label_N.tolist(), strict=True):
        votes = [0.0] * 8
        for index in sorted(range(16), key=lambda index: -cosine_M[index])[:10]:
            votes[int(label_N[index])] += math.exp(cosine_M[index] / 0.1)
        correct += votes.index(max(votes)) == label
    job = Job("probe", "features", 1, 16, 3)
    [line] = [
        line for line in lines_of(toy)[1:] if Job(*(line[name] for name in Job._fields)) == job
    ]
    assert line["top1"]["nearest neighbours"] == correct / 32


def test_targets_of_features_are_those_of_pixels_of_the_same_seed(toy: Path) -> None:
    config = ExperimentConfig(subject="shapes", output=str(toy))
    clip_BTHWC = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    targets = {}
    for seed in (0, 1):
        _, teacher = trials._student(config, trials.ARMS["features"], seed)
        assert teacher is not None
        targets[seed] = teacher(clip_BTHWC)
        encoder = load_pretrained(toy / "models" / f"pixels_{seed}").encoder
        with torch.no_grad():
            expected = torch.nn.functional.layer_norm(encoder(clip_BTHWC), (96,))
        torch.testing.assert_close(targets[seed], expected)
    assert not torch.allclose(targets[0], targets[1])


def test_frozen_and_scratch_start_from_the_weights_that_pretraining_starts_from() -> None:
    config = ExperimentConfig()
    model, _ = trials._student(config, trials.ARMS["pixels"], 0)
    start = model.encoder.state_dict()
    fresh, other = (
        trials.encoder_of(config, Job("probe", "random", seed=seed)).state_dict() for seed in (0, 1)
    )
    assert all(torch.equal(start[name], value) for name, value in fresh.items())
    assert not torch.equal(fresh["patch_embed.weight"], other["patch_embed.weight"])


def test_an_interrupted_run_goes_on_and_ends_with_the_same_figures(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[float]
) -> None:
    folder, go_on = tmp_path / "run", trials.take_step
    command = [f"output={folder}", *TOY, "arms=[ema_contrastive]", "repeated=[]"]

    def interrupt(*arguments: Any) -> None:
        if len(steps_taken) == 9:  # after the second saved state of the teacher that follows
            raise KeyboardInterrupt
        go_on(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "take_step", interrupt)
        assert main(command) == 130
    assert lines_of(folder)[1:] == []
    steps_taken.clear()
    assert main(command) == 0
    assert len(steps_taken) == (14 - 8) + 2 * (2 + 3) + tuning_steps(folder)
    assert lines_of(folder)[1:] == lines_of_arms(toy, "ema_contrastive")


def lines_of_arms(folder: Path, *arms: str) -> list[dict[str, Any]]:
    """Of a run, what one has that compares some of the arms alone."""
    return [line for line in lines_of(folder)[1:] if line["arm"] in ("random", *arms)]


def tuning_steps(folder: Path) -> int:
    """Of all fine-tuning that gives figures."""
    return sum(line["steps"] for line in lines_of(folder)[1:] if line["kind"] == "finetune")


def test_only_what_is_missing_is_done_again(
    toy: Path, tmp_path: Path, steps_taken: list[float]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "models").symlink_to(toy / "models")
    lines = (toy / "results.jsonl").read_text().splitlines(keepends=True)
    last_finetuning = max(index for index, line in enumerate(lines) if '"finetune"' in line)
    # a crash tore this one
    (folder / "results.jsonl").write_text(
        "".join(lines[:last_finetuning]) + lines[last_finetuning][:40]
    )
    assert main([f"output={folder}", *TOY]) == 0
    num_steps = json.loads(lines[last_finetuning])["steps"]
    assert len(steps_taken) == num_steps
    assert lines_of(folder) == lines_of(toy)
    assert main([f"output={folder}", *TOY]) == 0
    assert len(steps_taken) == num_steps


def test_two_workers_find_the_same_figures(
    toy: Path, tmp_path: Path, steps_taken: list[float]
) -> None:
    options = ["arms=[pixels,features]", "workers=2"]
    assert main([f"output={tmp_path / 'run'}", *TOY, *options]) == 0
    assert steps_taken == []  # in this process
    _, *lines = lines_of(tmp_path / "run")
    order = [(line["kind"], line["arm"], line["weights"]) for line in lines]
    for weights in (0, 1):
        teacher = order.index(("pretrain", "pixels", weights))
        assert teacher < order.index(("pretrain", "features", weights))
    expected = lines_of_arms(toy, "pixels", "features")
    assert sorted(lines, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels_per_class=[0]", "labels_per_class: .* must be different numbers"),
        ("seeds=[1,1]", "seeds: .* must be different numbers"),
        ("step=3", "unknown key step .*steps"),
        ("save_interval=3", "save_interval: 3 must be a multiple of log_interval"),
        ("warmup_steps=14", "warmup_steps: 14 must be below steps = 14"),
        ("unlabelled_clips=15", "labels_per_class: .* labels come from unlabelled_clips = 15"),
        ("repeated=[everything]", "repeated: .* must be of pixels, "),
        ("repeated=[features]", "repeated: .* pixels teach features"),
        (
            "finetune_lr=7",
            "results.jsonl: holds results of other settings .finetune_lr.: name another folder",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_starts(
    toy: Path,
    change: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    steps_taken: list[float],
) -> None:
    before = lines_of(toy)
    assert main([f"output={toy}", *TOY, change]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert steps_taken == []
    assert lines_of(toy) == before
    assert re.search(message, told), told


def test_people_are_clips_of_their_seed_before_the_photographs_and_from_the_sides_of_a_split() -> (
    None
):
    pytest.importorskip("pybullet")
    shown = SUBJECTS["people"]
    clips_NTHWC, label_N = shown.render(NAMES, 2, 16, 7)
    again_NTHWC, _ = shown.render(NAMES, 2, 3, 7)
    assert clips_NTHWC.shape == (16, 8, 52, 52, 3)
    assert label_N.tolist() == [*range(15), 0]
    assert torch.equal(clips_NTHWC[:3], again_NTHWC)
    mirrored = shown.vary(clips_NTHWC, np.random.default_rng(0))
    flips = [
        torch.equal(after, before.flip(2)) and not torch.equal(after, before)
        for before, after in zip(clips_NTHWC, mirrored, strict=True)
    ]
    assert 0 < sum(flips) < 16
    kept = [torch.equal(after, before) for before, after in zip(clips_NTHWC, mirrored, strict=True)]
    assert sum(flips) + sum(kept) == 16


def test_fewer_arms_can_be_compared(tmp_path: Path, quiet_process: None) -> None:
    folder = tmp_path / "run"
    options = ["arms=[pixels]", "repeated=[]", "labels_per_class=[1]"]
    assert main([f"output={folder}", *TOY, *options]) == 0
    arms = {line["arm"] for line in lines_of(folder)[1:]}
    assert arms == {"random", "pixels"}
    table = (folder / "table.md").read_text()
    assert table.count("| fine-tuned |") == 2
    assert "contrastive term" not in table


def test_the_sentences_are_worked_out_from_the_means_also_where_these_are_unfavourable() -> None:
    means = {
        "random": {8: [0.2, 0.1], 16: [0.7, 0.8]},
        "pixels": {8: [0.5, 0.3], 16: [0.6, 0.7]},
        "pixels_contrastive": {8: [0.5, 0.5], 16: [0.6, 0.6]},
        "features": {8: [0.4, 0.4], 16: [0.9, 0.9]},
        "features_contrastive": {8: [0.3, 0.3], 16: [0.8, 0.8]},
        "ema_contrastive": {8: [0.1, 0.1], 16: [0.1, 0.1]},
    }
    accuracies = {
        (method, arm): values for method in accuracy_report.METHODS for arm, values in means.items()
    }
    found = margins(accuracies, ("linear", "pixels"), ("linear", "random"))
    assert found == pytest.approx({8: 0.25, 16: -0.1})
    assert standard_error([0.5, 0.3]) == pytest.approx(0.1)
    assert standard_error([0.5]) == 0
    text = findings(accuracies, {arm: arm.upper() for arm in means})
    assert (
        "from PIXELS_CONTRASTIVE, the arm with the largest margin, against from scratch: "
        "+35.0 +- 5.0 points at 8, -15.0 +- 5.0 points at 16." in text
    )
    assert (
        "(FEATURES against PIXELS), linear: +0.0 +- 10.0 points at 8, +25.0 +- 5.0 points at 16."
        in text
    )
    assert "(FEATURES_CONTRASTIVE against FEATURES), fine-tuned: -10.0 +- 0.0 points at 8" in text
