"""The probe of a pretraining run: its figures again from the model folder, its time, its lists."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from video_mae import load_pretrained, tube_mask
from video_mae.config import PretrainConfig
from video_mae.data.sampling import sample_seed
from video_mae.decoding import Reading, read_clip
from video_mae.evaluation.features import FrozenEncoder
from video_mae.model.vit import VideoMAE
from video_mae.training import feature_probe
from video_mae.training.feature_probe import FeatureProbe
from video_mae.training.loop import DONE
from video_mae.training.pretrain import Pretraining, prepare, run

Tiny = Callable[..., PretrainConfig]
# 16 frames of 48 x 48 pixels: no resizing, and 4 frames 2 apart start at 4
WHOLE = ("model.height=48", "model.width=48", "data.crop=center", "probe.max_share=1")

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def probed(config: PretrainConfig) -> list[dict[str, Any]]:
    text = (Path(config.output) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "probe_loss" in line]


def test_a_line_is_what_the_saved_model_gives(tiny: Tiny, demo_folder: Path) -> None:
    """The lists of 24 and 8 videos, of which 5 each are used, again in plain numpy."""
    config = tiny(
        *WHOLE,
        f"probe.train={demo_folder / 'train.txt'}",
        f"probe.validation={demo_folder / 'val.txt'}",
        "probe.num_videos=5",
        "probe.interval=3",
        "model.class_tokens=1",
        "objective.contrastive_weight=0.1",
        "journal.tensorboard=true",
    )
    assert run(prepare(config)) == DONE
    found = probed(config)
    assert [line["step"] for line in found] == [3, 4]
    model = load_pretrained(Path(config.output) / "model")
    assert isinstance(model, VideoMAE)
    encoder, losses = FrozenEncoder(model, torch.device("cpu")), []
    features, labels = {}, {}
    for name in ("train", "val"):
        entries = [
            line.rsplit(" ", 1) for line in (demo_folder / f"{name}.txt").read_text().splitlines()
        ]
        places = [int(number * len(entries) / 5) for number in range(5)]
        labels[name], rows = np.array([int(entries[place][1]) for place in places]), []
        for place in places:
            clip_THWC = read_clip(str(demo_folder / entries[place][0]), [4, 6, 9, 11], Reading())
            clip_BTHWC = torch.from_numpy(clip_THWC.clip_THWC)[None]
            rows.append(encoder(clip_BTHWC).pooled_BD[0].numpy())
            if name == "val":
                seed_B = torch.tensor([sample_seed(0, 0, place, 0)])
                with torch.no_grad():
                    output = model(clip_BTHWC, tube_mask(seed_B, model.grid, 0.75))
                losses.append([float(loss) for loss in output[:3]])
        features[name] = np.stack(rows)
    last, x = found[-1], features["val"]
    for place, name in enumerate(("loss", "reconstruction_loss", "contrastive_loss")):
        assert last[f"probe_{name}"] == pytest.approx(np.mean(losses, axis=0)[place], rel=1e-4)
    assert last["probe_contrastive_loss"] > 0.1
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    assert last["probe_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
    deviation = x.std(axis=0)
    assert last["probe_dead"] == (deviation < 0.01 * deviation.mean()).mean()
    unit = {name: one / np.linalg.norm(one, axis=1)[:, None] for name, one in features.items()}
    votes = np.exp(unit["val"] @ unit["train"].T / 0.07) @ np.eye(8)[labels["train"]]
    assert last["probe_knn"] == (votes.argmax(axis=1) == labels["val"]).mean()
    assert last["probe_ridge"] in np.arange(6) / 5
    log = (Path(config.output) / "log.txt").read_text()
    assert "step 4/4  probe loss " in log
    page = (Path(config.output) / "report.html").read_text()
    assert f"effective rank {last['probe_rank']:.4g}; " in page


def watch(training: Pretraining, states: list[Any]) -> None:
    """Keeps the states that nothing after a step may change, from before it and from then on."""
    follow = training.after

    def state() -> list[Any]:
        drawn = (
            torch.get_rng_state().tolist(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
        )
        return [*drawn, training.model.training, torch.get_num_threads()]

    def after(done: int) -> None:
        before = state()
        follow(done)
        states.append((before, state()))

    training.after = after


def stop_after(training: Pretraining, step: int) -> None:
    """Ends a run as a signal does."""

    def after(done: int) -> None:
        training.signal = 15 * (done == step)

    training.after = after


def test_a_probe_that_is_turned_on_later_changes_no_bit(
    tiny: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    """Nor random states and flags; nothing drawn for the run (drop path) is another."""
    common = ("model.drop_path=0.5", "data.num_workers=1", "journal.checkpoint_interval=2")
    probe = (f"probe.validation={demo_folder / 'val.txt'}", "probe.interval=1", "probe.max_share=1")
    weights, states = [], list[Any]()
    for name, more, steps in (("plain", (), []), ("probed", probe, [3, 4])):
        common = (*common, f"output={tmp_path / name}")
        training = prepare(tiny(*common))
        stop_after(training, 2)
        assert run(training) == 128 + 15
        training = prepare(tiny(*common, *more))
        watch(training, states)
        assert run(training) == DONE
        weights.append(load_pretrained(tmp_path / name / "model").state_dict())
        assert [line["step"] for line in probed(training.config)] == steps
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(states) == 4
    assert all(before == after for before, after in states)


def test_without_labels_what_needs_none_is_measured_after_each_epoch(
    tiny: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos.txt"
    named = [line.rsplit(" ", 1)[0] for line in (demo_folder / "val.txt").read_text().splitlines()]
    videos.write_text("".join(f"{name}\n" for name in named))
    config = tiny(
        f"probe.validation={videos}",
        f"probe.root={demo_folder}",
        "probe.max_share=1",
        "optim.steps=7",
        "optim.micro_batch=8",
    )
    assert run(prepare(config)) == DONE
    found = probed(config)
    assert [line["step"] for line in found] == [3, 6, 7]  # 24 videos, 8 a step
    keys = {"step", "epoch", "time", "probe_loss", "probe_rank", "probe_dead"}
    assert all(line.keys() == keys for line in found)


def test_broken_videos_are_told_and_do_not_count(
    tiny: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    found = []
    for name, broken in (("whole", False), ("broken", True)):
        entries = [f"{demo_folder / line}" for line in (demo_folder / "val.txt").open()][:3]
        if broken:
            (tmp_path / "broken.mp4").write_bytes(b"no video")
            entries.insert(2, f"{tmp_path / 'broken.mp4'} 0\n")
            entries[3] = entries[2].replace("broken.mp4 0", "broken.mp4 1")
        else:
            entries = entries[:2]
        (tmp_path / f"{name}.txt").write_text("".join(entries))
        config = tiny(
            f"probe.train={tmp_path / f'{name}.txt'}",
            f"probe.validation={tmp_path / f'{name}.txt'}",
            "probe.max_share=1",
            "optim.steps=1",
            f"output={tmp_path / name}",
        )
        assert run(prepare(config)) == DONE
        found.append({**probed(config)[0], "time": 0})
        log = (tmp_path / name / "log.txt").read_text()
        assert ("broken.mp4 does not count: " in log) == broken
    assert found[0] == found[1]
    video = f"probe.validation={tmp_path / 'broken.mp4'}"
    only = tiny(video, "optim.steps=1", f"output={tmp_path / 'only'}")
    assert run(prepare(only)) == DONE
    assert probed(only) == []


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(feature_probe, "time", clock)
    return clock


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("is_slower_here", [False, True])
def test_probes_take_no_more_than_their_share_of_the_time(
    tiny: Tiny,
    demo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    share: float,
    is_slower_here: bool,
) -> None:
    """Of 1000 seconds of training in 100 intervals; a probe takes 7."""
    probe = FeatureProbe(
        tiny(f"probe.validation={demo_folder / 'val.txt'}", f"probe.max_share={share}")
    )
    said, steps = [], []
    # the second rank's answer is not asked for
    journal: Any = SimpleNamespace(
        engine=SimpleNamespace(gather=lambda mine: [mine, is_slower_here], rank=0),
        total_steps=100,
        say=said.append,
        aside=nullcontext,
        record=lambda done, epoch, scores: steps.append(done),
    )

    def encode(*arguments: Any) -> list[torch.Tensor]:
        clock.now += 7
        return [torch.zeros(1)]

    monkeypatch.setattr(probe, "_encode", encode)
    monkeypatch.setattr(probe, "scores", lambda **found: {})
    for done in range(1, 101):
        clock.now += 10
        probe.follow(done, 0.0, journal, lambda batch: pytest.fail("no loss is wanted"))
        if done < 100:
            assert 7 * (len(steps) - 1) <= share * (clock.now - 100)  # the first is not known
    assert steps[0] == 1
    assert steps[-1] == 100
    assert len(steps) == {0.02: 4, 0.3: 51, 1.0: 100}[share]
    assert len(said) == (share < 1)
    assert all("after step 2, " in line for line in said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["probe.train={0}/val.txt"], "probe.validation: (empty), name a list file"),
        (["probe.validation=/no/list"], "probe.validation: no such list file or folder: /no/list"),
        (
            ["probe.train={0}/unlabelled.txt", "probe.validation={0}/val.txt"],
            "probe.train: {0}/video.mp4 has no label",
        ),
        (
            ["probe.train={0}/few.txt", "probe.validation={0}/val.txt"],
            "probe.validation: {0}/video.mp4 has the label 3, there are 2 classes",
        ),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line_before_anything_starts(
    tiny: Tiny, tmp_path: Path, changes: list[str], words: str
) -> None:
    (tmp_path / "video.mp4").write_bytes(b"")
    for name, label in (("val", " 3"), ("few", " 1"), ("unlabelled", "")):
        (tmp_path / f"{name}.txt").write_text(f"{tmp_path}/video.mp4{label}\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(tiny(*(change.format(tmp_path) for change in changes)))
    assert words.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
