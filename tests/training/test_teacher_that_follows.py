"""A teacher that is a moving average of its student: by its definition, the same after a resume,
and watched.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import saved_state

from video_mae import VideoMAE
from video_mae.config import PretrainConfig
from video_mae.model.vit import Encoder
from video_mae.training.collapse import LOW_LINES, NUM_WATCHED, RankWatch
from video_mae.training.feature_quality import effective_rank
from video_mae.training.loop import DONE, STOPPED_BY_POLICY
from video_mae.training.pretrain import Pretraining, prepare, run
from video_mae.training.teacher import MovingTeacher

Tiny = Callable[..., PretrainConfig]
State = dict[str, torch.Tensor]
FEATURES = ["objective.target=features", "objective.teacher=ema", "journal.checkpoint_interval=2"]

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def metrics(config: PretrainConfig, key: str) -> list[float]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def saved_averages(config: PretrainConfig, step: int) -> State:
    state = saved_state(Path(config.output) / "checkpoints" / f"step_{step:08d}")
    return {
        name.removeprefix("tensor/"): state[name] for name in state if name.startswith("tensor/")
    }


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The encoder's weights, as the student computes with them, at the start and after each step."""
    states: list[State] = []
    begin, after = Pretraining.begin, Pretraining.after

    def look(training: Pretraining) -> None:
        with training.engine.whole(training.model.parameters()):
            encoder = training.model.encoder
            states.append({n: p.detach().clone() for n, p in encoder.named_parameters()})

    def observed_begin(self: Pretraining) -> None:
        look(self)
        begin(self)

    def observed_after(self: Pretraining, done: int) -> None:
        look(self)
        after(self, done)

    monkeypatch.setattr(Pretraining, "begin", observed_begin)
    monkeypatch.setattr(Pretraining, "after", observed_after)
    return states


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        (0, "fp32", []),
        (1, "bf16", ["model.positions=learned"]),
        (2, "fp32", ["optim.accumulation=2", "model.encoder_norm=false"]),
        (3, "bf16", ["model.class_tokens=1", "optim.ema=0.9"]),
        (3, "fp32", ["engine.offload=parameters"]),
    ],
)
def test_the_teacher_is_the_average_of_its_definition(
    tiny: Tiny, history: list[State], stage: int, precision: str, more: list[str]
) -> None:
    config = tiny(
        *FEATURES,
        "objective.teacher_momentum=0.6",
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        *more,
    )
    assert run(prepare(config)) == DONE
    assert len(history) == 5
    expected = {name: value.double() for name, value in history[0].items()}
    for momentum, state in zip([0.6, 0.7, 0.8, 0.9], history[1:], strict=True):
        for name, value in state.items():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.double()
    averages = saved_averages(config, 4)
    for name, value in expected.items():
        torch.testing.assert_close(
            averages[f"teacher.{name}"].double(), value.flatten(), rtol=1e-6, atol=1e-7
        )
    assert max((history[4][name] - value).abs().max() for name, value in expected.items()) > 1e-3
    ranks = metrics(config, "feature_rank")
    assert all(2 < rank < config.model.embed_dim for rank in ranks)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_a_resumed_run_has_the_same_teacher(tiny: Tiny, stage: int, precision: str) -> None:
    config = tiny(
        *FEATURES,
        "objective.teacher_momentum=0.6",
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
    )
    assert run(prepare(config)) == DONE
    before = saved_averages(config, 4), metrics(config, "loss"), metrics(config, "feature_rank")
    shutil.rmtree(Path(config.output) / "checkpoints" / "step_00000004")
    assert run(prepare(config)) == DONE
    after = saved_averages(config, 4), metrics(config, "loss"), metrics(config, "feature_rank")
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in after[0])


def test_targets_are_those_of_the_averages(tiny: Tiny) -> None:
    """Of a plain encoder with these weights, each token normalised."""
    model = tiny().model
    student = Encoder(model)
    teacher = MovingTeacher(Encoder(model), model.grid, torch.float32, 0.5)
    engine: Any = SimpleNamespace(whole=lambda module: torch.no_grad())
    teacher.start(engine, student)
    first = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.follow(engine, student, 0.5)
    expected = Encoder(model)
    expected.load_state_dict(
        {name: 0.75 * first[name] + 0.25 * value for name, value in student.state_dict().items()}
    )
    clip_BTHWC = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    target_BNF = teacher(clip_BTHWC)
    assert not target_BNF.requires_grad
    torch.testing.assert_close(
        target_BNF, F.layer_norm(expected(clip_BTHWC), (model.embed_dim,)), rtol=1e-4, atol=1e-4
    )


def test_the_watched_tokens_are_other_places_of_all_clips() -> None:
    engine: Any = None  # `see` does not need it
    watch = RankWatch(engine, 2.0)
    for clips, tokens in ((2, 7), (3, 1568), (1, 511)):
        places_BNF = torch.arange(clips * tokens).reshape(clips, tokens, 1)
        watch.see(places_BNF)
        places = watch.tokens_SF.flatten().tolist()
        assert len(set(places)) == len(places) == min(NUM_WATCHED, clips * tokens)
        shares = torch.tensor(places).div(tokens, rounding_mode="floor").bincount() / len(places)
        assert shares.tolist() == pytest.approx([1 / clips] * clips, abs=0.02)


def test_ranks_that_stay_low_are_a_reason_to_stop() -> None:
    engine: Any = SimpleNamespace(mean=lambda value: value)
    watch = RankWatch(engine, 2.0)
    memory: dict[str, Any] = {}
    alike = torch.ones(1, 40, 8)
    various = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0))
    for step in range(1, LOW_LINES):
        watch.see(alike)
        assert watch.rank(step, memory) == pytest.approx(1.0)
    watch.see(various)
    assert watch.rank(LOW_LINES, memory) == pytest.approx(float(effective_rank(various[0])))
    assert memory == {"low_rank_steps": []}
    for step in range(20, 20 + 10 * LOW_LINES, 10):
        assert watch.reason == ""
        watch.see(alike)
        # as after a resume, which has the memory alone
        watch = watch if step != 40 else RankWatch(engine, 2.0)
        watch.see(alike)
        watch.rank(step, memory)
    assert watch.reason == (
        "the features of the teacher have collapsed: their effective rank is 1.00, and below "
        "objective.min_rank = 2 since step 20; begin a new run with a lower optim.base_lr, a "
        "longer warm-up, or objective.teacher_momentum nearer to 1"
    )


def test_a_run_whose_features_collapse_stops_with_a_line(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model = Pretraining.make_model

    def degenerate(self: Pretraining) -> tuple[VideoMAE, float]:
        model, macs = make_model(self)
        torch.nn.init.zeros_(model.get_parameter("encoder.norm.weight"))
        torch.nn.init.normal_(model.get_parameter("encoder.norm.bias"))
        return model, macs

    monkeypatch.setattr(Pretraining, "make_model", degenerate)
    config = tiny(*FEATURES, "optim.steps=8", "objective.teacher_momentum=1")
    assert run(prepare(config)) == STOPPED_BY_POLICY
    assert metrics(config, "feature_rank") == pytest.approx([1.0] * LOW_LINES, abs=1e-3)
    last = (Path(config.output) / "log.txt").read_text().splitlines()[-1]
    assert "stopped at step 5: the features of the teacher have collapsed" in last
    assert "since step 1; begin a new run with" in last
    unwatched = tiny(
        *FEATURES,
        "objective.min_rank=0",
        "objective.teacher_momentum=1",
        "output=" + config.output + "_2",
    )
    assert run(prepare(unwatched)) == DONE
    assert "feature_rank" not in (Path(unwatched.output) / "metrics.jsonl").read_text()
