"""The benchmark of the training step: the competitor computes the same, times are fair, parts add
up, and what is missing says so.
"""

import math
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from video_mae import ModelConfig, VideoMAE, tube_mask
from video_mae.benchmark import step_models
from video_mae.benchmark.clock import Clock, Stopwatch, peak_growth, ratio
from video_mae.benchmark.record import Record, Results
from video_mae.benchmark.step import (
    OURS_BY_ENGINE,
    PARTS,
    THEIRS,
    THEIRS_PREPARED,
    StepBench,
    StepBenchConfig,
    tables,
)
from video_mae.benchmark.step_models import EngineTrainer, Step, Trainer, kept_bytes
from video_mae.model.vit import pretraining_macs

CPU = torch.device("cpu")
TINY = ModelConfig(
    num_frames=8,
    height=32,
    width=48,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=4,
)
CASE = StepBench(
    preset="tiny",
    model=TINY,
    batch=2,
    rounds=2,
    is_compiled=False,
    clock=Clock(CPU),
    dtype=torch.float32,
    ceiling=1e9,
)

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def some_clip(config: ModelConfig = TINY, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(
        0,
        256,
        (batch, config.num_frames, config.height, config.width, 3),
        dtype=torch.uint8,
        generator=generator,
    )


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Of a whole small case."""
    pytest.importorskip("transformers")
    return CASE.measure()


def of(records: list[Record], op: str) -> dict[tuple[str, str], Record]:
    return {(record.provider, record.mode): record for record in records if record.op == op}


# ---------------------------------------------------------------- the competitor


def test_hugging_face_computes_our_loss_and_our_gradients_with_our_weights():
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    ours = VideoMAE(replace(TINY, norm_eps=0.02, head_norm_eps=0.05))  # so large that they count
    for parameter in ours.parameters():  # also biases and norms, which start at 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = step_models.hugging_face_model(ours)
    clip, mask = some_clip(), tube_mask(torch.tensor([5, 6]), TINY.grid, 0.75)
    our_loss = ours(clip, mask).loss
    their_loss = theirs(
        step_models.prepare(clip, TINY), step_models.boolean_mask(mask, TINY.num_tokens)
    ).loss
    assert their_loss.item() == pytest.approx(our_loss.item(), abs=1e-5)
    our_loss.backward()
    their_loss.backward()
    block: Any = ours.decoder.blocks[0]
    layer: Any = theirs.decoder.decoder_layers[0]
    norm: Any = theirs.videomae.layernorm
    pairs = [
        (
            ours.encoder.patch_embed.weight,
            theirs.videomae.embeddings.patch_embeddings.projection.weight,
        ),
        (ours.decoder.mask_token, theirs.mask_token),
        (block.attn.qkv.v_bias, layer.attention.attention.value.bias),
        (block.mlp[0].weight, layer.intermediate.dense.weight),
        (ours.encoder.norm.bias, norm.bias),
    ]
    for our, their in pairs:
        torch.testing.assert_close(our.grad.flatten(), their.grad.flatten(), rtol=1e-3, atol=1e-5)


def test_their_input_is_what_their_own_processor_makes():
    pytest.importorskip("transformers")
    clip = some_clip()
    prepared = step_models.prepare(clip, TINY)
    theirs = step_models.processor(TINY)(list(clip.permute(0, 1, 4, 2, 3)), return_tensors="pt")[
        "pixel_values"
    ]
    assert prepared.shape == (2, 8, 3, 32, 48)
    assert prepared.is_contiguous()
    torch.testing.assert_close(prepared, theirs, rtol=0, atol=1e-5)
    value = (clip[1, 2, 3, 4, 1].item() / 255 - 0.456) / 0.224
    assert prepared[1, 2, 1, 3, 4].item() == pytest.approx(value, abs=1e-5)


def test_their_mask_hides_what_ours_hides():
    mask = tube_mask(torch.tensor([1, 2, 3]), TINY.grid, 0.6)
    hidden = step_models.boolean_mask(mask, TINY.num_tokens)
    for b in range(3):
        assert hidden[b].nonzero().flatten().tolist() == mask.masked_BM[b].tolist()


def test_nothing_is_compared_where_the_losses_differ(monkeypatch):
    pytest.importorskip("transformers")
    build = step_models.hugging_face_model

    def wrong(model: VideoMAE) -> nn.Module:
        theirs: Any = build(model)
        theirs.decoder.head.bias.data += 0.5
        return theirs

    monkeypatch.setattr(step_models, "hugging_face_model", wrong)
    found = CASE.measure()
    assert "differ" in str(of(found, "loss")[THEIRS, "full"].measures["gate"])
    assert [key for record in found for key in record.measures if key.startswith("x ")] == []
    assert "NOT COMPARED" in tables(Results({}, found))[0].text()


def test_without_transformers_ours_is_measured_and_a_row_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = CASE.measure()
    assert "pip install transformers" in of(found, "step")[THEIRS, "full"].reason
    assert of(found, "step")["ours eager", "full"].times["step"].p50 > 0
    assert f"{THEIRS} " in tables(Results({}, found))[0].text()
    assert "not available" in tables(Results({}, found))[0].text()


def test_without_deepspeed_a_row_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = of(CASE.measure(), "step")
    assert found[OURS_BY_ENGINE, "full"].reason.endswith("; pip install deepspeed")
    assert found["ours eager", "full"].times["step"].p50 > 0


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_by_the_engine_is_the_step_of_the_others(dtype):
    torch.manual_seed(4)
    model, clip, mask = (
        VideoMAE(TINY),
        some_clip(),
        tube_mask(torch.tensor([5, 6]), TINY.grid, 0.75),
    )
    start = [parameter.detach().clone() for parameter in model.parameters()]
    by_engine = EngineTrainer(model, CPU, dtype, batch=2)
    by_hand = Trainer(model, CPU, dtype)
    for trainer, called in ((by_engine, by_engine.engine), (by_hand, model)):
        step = Step(trainer, clip, called, mask)
        for _ in range(3):
            step()
    moved = apart = 0.0
    for before, ours, theirs in zip(
        start,
        by_engine.engine.full_state().values(),
        by_hand.masters or model.parameters(),
        strict=True,
    ):
        # DeepSpeed's masters start from rounded weights
        our_way, their_way = ours - before.to(dtype).float(), theirs - before
        moved += their_way.abs().sum().item()
        apart += (our_way - their_way).abs().sum().item()
    assert apart < 0.05 * moved  # AdamW makes much of the last bits of a small gradient
    assert {parameter.dtype for parameter in by_engine.model.parameters()} == {dtype}
    assert kept_bytes(by_engine) >= 12 * sum(parameter.numel() for parameter in model.parameters())


def test_a_case_has_a_record_for_every_step_with_all_its_figures(records):
    steps = of(records, "step")
    ours = {
        (provider, mode) for provider in ("ours eager", OURS_BY_ENGINE) for mode in ("full", "dual")
    }
    assert set(steps) == {*ours, (THEIRS, "full"), (THEIRS_PREPARED, "full")}
    for (provider, mode), record in steps.items():
        assert (record.benchmark, record.shape, record.dtype, record.reason) == (
            "step",
            "tiny, 2 x 8x32x48",
            "float32",
            "",
        )
        seconds = record.times["step"].p50 / 1e3
        assert record.measures["clips_per_second"] == pytest.approx(2 / seconds)
        assert float(record.measures["peak_mb"]) > 0
        assert record.measures["ceiling_percent"] == pytest.approx(
            100 * float(record.measures["tflops"]) * 1e12 / CASE.ceiling
        )
        ratios = {key for key in record.measures if key.startswith("x ")}
        assert ratios == (
            {f"x {THEIRS}", f"x {THEIRS_PREPARED}"} if provider.startswith("ours") else set()
        ), mode
    loss = of(records, "loss")[THEIRS, "full"].measures
    assert loss["gate"] == ""
    assert loss["ours"] == pytest.approx(loss["theirs"], abs=1e-5)
    assert {provider for provider, _ in of(records, "preparation")} == {
        "in two passes",
        "by VideoMAEVideoProcessor",
    }


def test_dual_masking_counts_less_work_than_full_decoding(records):
    steps = of(records, "step")
    cells = [steps["ours eager", mode] for mode in ("full", "dual")]
    full, dual = (float(cell.measures["tflops"]) * cell.times["step"].p50 for cell in cells)
    mask = tube_mask(torch.tensor([0]), TINY.grid, 0.9)
    visible, hidden = mask.visible_BV.shape[1], mask.masked_BM.shape[1]
    assert full == pytest.approx(6 * 2 * pretraining_macs(TINY, visible, hidden) / 1e9)
    assert dual == pytest.approx(
        6 * 2 * pretraining_macs(TINY, visible, hidden - hidden // 2) / 1e9, rel=0.05
    )
    assert dual < 0.8 * full


def test_a_step_that_fails_is_a_row_that_says_why(monkeypatch):
    pytest.importorskip("transformers")
    build = step_models.hugging_face_model

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory\nand a long story")

    def large(model: VideoMAE) -> nn.Module:
        theirs: Any = build(model)
        theirs.forward = no_memory
        return theirs

    losses = {"ours": 1.0, "theirs": 1.0, "gate": ""}
    monkeypatch.setattr(step_models, "hugging_face_model", large)
    monkeypatch.setattr(
        StepBench,
        "compare_losses",
        lambda bench, *_: bench.record("loss", THEIRS, "full", measures=losses),
    )
    found = CASE.measure()
    assert of(found, "step")[THEIRS, "full"].reason == "OutOfMemoryError: out of memory"
    assert of(found, "step")["ours eager", "full"].times["step"].p50 > 0
    assert "OutOfMemoryError: out of memory" in tables(Results({}, found))[0].text()


def test_tables_show_steps_and_parts(records):
    shown = tables(Results({"device": "x"}, records))
    assert [table.title for table in shown] == [
        "step tiny, 2 x 8x32x48 float32",
        "parts of the step tiny, 2 x 8x32x48 float32, ms",
    ]
    assert [row[0] for row in shown[1].rows] == [*PARTS, "sum", "marked over unmarked step"]
    assert any("by VideoMAEVideoProcessor" in note for note in shown[0].notes)
    for table in shown:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table.markdown().isascii()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("presets", "smal", "presets: smal is not one of small"),
        ("presets", " ", "presets: "),
        ("compiled", "tiny", "compiled: tiny"),
        ("rounds", 1, "rounds: 1"),
        ("side", -1, "side: -1"),
        ("output", "", "output: "),
    ],
)
def test_settings_that_make_no_sense_are_refused(key, value, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        StepBenchConfig(**{key: value})


# ---------------------------------------------------------------- parts


class Slow(torch.autograd.Function):
    """An identity that takes its time."""

    @staticmethod
    def forward(ctx, x, seconds):
        time.sleep(seconds[0])
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(ctx.seconds[1])
        return gradients[0].clone(), None


class SlowModule(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Slow.apply(x, self.seconds)


def test_time_goes_to_the_part_that_took_it_forward_and_backward():
    model = nn.Sequential(SlowModule(0.02, 0.05), SlowModule(0.03, 0.01), SlowModule(0.01, 0.06))
    borders = [
        step_models.Border(model[1], "input", "first", "second"),
        step_models.Border(model[1], "output", "second", "first"),
    ]
    watch = Stopwatch()
    with step_models.marked(borders, watch):
        model(torch.zeros(3, requires_grad=True)).sum().backward()
        watch.lap("first")
        time.sleep(0.02)
        watch.lap("end of step")
    parts = watch.parts()
    for part, expected in {
        "first": 20 + 10 + 60 + 50,
        "second": 30 + 10,
        "end of step": 20,
    }.items():
        assert expected <= parts[part] <= expected + 25, part
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parts_of_both_models_are_all_there_and_add_up_to_the_step(records):
    parts = of(records, "parts")
    assert set(parts) == {("ours eager", "full"), ("ours eager", "dual"), (THEIRS, "full")}
    ours, theirs = set(parts["ours eager", "full"].times), set(parts[THEIRS, "full"].times)
    assert ours == set(PARTS) - {"preparation"}
    assert theirs == set(PARTS) - {"gather"}
    model = VideoMAE(TINY)
    trainer = Trainer(model, CPU, torch.float32)
    mask = tube_mask(torch.tensor([5, 6]), TINY.grid, 0.75)
    whole = Step(trainer, some_clip(), model, mask)
    whole()
    shares = []
    for _ in range(5):
        start = time.perf_counter()
        parts = whole.parts()
        shares.append(sum(parts.values()) / 1e3 / (time.perf_counter() - start))
    assert 0.9 < statistics.median(shares) <= 1  # hooks are set outside the step


def test_marks_change_no_gradient():
    torch.manual_seed(2)
    model, clip, mask = (
        VideoMAE(TINY),
        some_clip(),
        tube_mask(torch.tensor([5, 6]), TINY.grid, 0.75),
    )
    plain = torch.autograd.grad(model(clip, mask).loss, list(model.parameters()))
    with step_models.marked(step_models.borders_of(model), Stopwatch()):
        marked = torch.autograd.grad(model(clip, mask).loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, marked, strict=True))


# ---------------------------------------------------------------- fair times


def test_calls_take_turns_back_and_forth(capsys, monkeypatch):
    monkeypatch.setattr("video_mae.progress_bar.LINE_SECONDS", 0.0)
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = Clock(CPU).in_turn(calls, 3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"  # warm-up, then rounds
    assert [len(times) for times in samples.values()] == [3, 3, 3]
    assert "0/9 [" in capsys.readouterr().err  # and so on ten times a second


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians():
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert ratio([10.0, 1.0, 2.0], [1.0, 1.0, 2.0]) == 1.0


def test_bfloat16_trains_a_float32_master_copy():
    torch.manual_seed(3)
    layer, exact = nn.Linear(5, 4), nn.Linear(5, 4)
    exact.load_state_dict(layer.state_dict())
    trainer, optimizer = Trainer(layer, CPU, torch.bfloat16), Trainer(exact, CPU, torch.float32)
    x = torch.randn(7, 5)
    for _ in range(20):
        layer(x.bfloat16()).square().sum().backward()
        for weight, master in zip(layer.parameters(), exact.parameters(), strict=True):
            assert weight.dtype == torch.bfloat16
            assert weight.grad is not None
            master.grad = weight.grad.float()
        trainer.update()
        optimizer.update()
        assert layer.weight.grad is None
    assert torch.equal(layer.weight, exact.weight.bfloat16())
    # weights, masters, their gradients, two moments; a counter a tensor
    assert kept_bytes(trainer) == 24 * (2 + 4 + 4 + 8) + 2 * 4
    assert kept_bytes(optimizer) == 24 * (4 + 8) + 2 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_worst_moment():
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.append(torch.ones(8_000_000))
        first = torch.ones(32_000_000)
        del first
        torch.ones(16_000_000)

    _, growth = peak_growth(call, CPU)  # 160 MB; 96 in the end, 224 in all
    assert 156e6 < growth < 183e6


def test_the_gate_is_closed_for_other_weights():
    pytest.importorskip("transformers")
    ours, mask = VideoMAE(TINY), tube_mask(torch.tensor([5, 6]), TINY.grid, 0.75)
    theirs = step_models.hugging_face_model(ours)
    right, wrong = (
        CASE.compare_losses(model, theirs, some_clip(), mask).measures
        for model in (ours, VideoMAE(TINY))
    )
    assert right["gate"] == ""
    assert math.isfinite(float(right["ours"]))
    assert f"ours is {wrong['ours']:.6f}, theirs {right['theirs']:.6f}" in str(wrong["gate"])
