"""What `video-mae plan` says, against what torch and the models themselves count."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from video_mae import VideoClassifier, VideoMAE
from video_mae.cli import main
from video_mae.config import FinetuneConfig, PretrainConfig, load_config
from video_mae.config.machines import FACTS
from video_mae.config.optim import OptimConfig
from video_mae.config.plan import FinetunePlanConfig, PretrainPlanConfig, plan_schema
from video_mae.model.masking import mask_counts, token_mask
from video_mae.model.vit import encoder_macs, pretraining_macs
from video_mae.planning.loading import loading_rows, planned_sources
from video_mae.planning.plan import Planner
from video_mae.planning.rehearsal import Rehearsal
from video_mae.planning.zero import zero_costs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted([*CONFIGS.glob("pretrain/*.yaml"), *CONFIGS.glob("finetune/*.yaml")])
MODEL = {
    "num_frames": 4,
    "height": 32,
    "width": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
PRETRAIN = {"model": MODEL, "mask": {"ratio": 0.75}, "optim": {"steps": 10, "warmup_steps": 1}}
FINETUNE = {"model": MODEL, "classifier": {"num_classes": 5}, "augment": {"mix_probability": 0}}


@pytest.fixture
def pretrain(tmp_path: Path) -> Path:
    file = tmp_path / "pretrain.yaml"
    file.write_text(yaml.safe_dump({**PRETRAIN, "output": str(tmp_path / "run")}))
    return file


@pytest.fixture
def finetune(tmp_path: Path) -> Path:
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump({**FINETUNE, "output": str(tmp_path / "run")}))
    return file


def clip_of(config: PretrainConfig | FinetuneConfig, num_clips: int) -> torch.Tensor:
    c = config.model
    return torch.zeros(num_clips, c.num_frames, c.height, c.width, 3, dtype=torch.uint8)


def counted(loss_of: Callable[..., torch.Tensor], *inputs: object) -> int:
    """FLOPs by torch, of the reference path on the meta device."""
    with FlopCounterMode(display=False) as counter:
        loss_of(*inputs).backward()
    return counter.get_total_flops()


def test_parameters_and_flops_of_pretraining_are_exact(pretrain: Path):
    config = load_config(pretrain)
    c, grid = config.model, config.model.grid
    with torch.device("meta"):
        model = VideoMAE(c, impl="reference")
        mask = token_mask(torch.arange(2), grid, "tube", 0.75)
        flops = counted(lambda *inputs: model(*inputs).loss, clip_of(config, 2), mask) / 2
    rehearsal = Rehearsal(config, "reference", False)
    gflops = rehearsal.gflops()
    assert gflops["Global"] * 1e9 == pytest.approx(flops, rel=1e-12)
    assert gflops["encoder"] + gflops["decoder"] == pytest.approx(gflops["Global"], rel=1e-12)
    shapes = [p.shape for p in rehearsal.model.parameters()]
    assert shapes == [p.shape for p in VideoMAE(c).parameters()]
    # What `mfu` counts, but pixels need no gradient, and the last block of the decoder computes
    # those tokens alone that are predicted, once it has attended to all.
    visible, masked = mask_counts(grid, "tube", 0.75)
    width = c.decoder_embed_dim
    pixels = 2 * visible * c.tubelet_values * c.embed_dim
    left_out = 6 * visible * width**2 * (1 + 2 * c.decoder_mlp_ratio)
    assert flops == 6 * pretraining_macs(c, visible, masked) - pixels - left_out
    attention = 3 * 2 * 2 * (c.depth * visible**2 * c.embed_dim + 2 * c.num_tokens**2 * width)
    assert gflops["attention"] * 1e9 == pytest.approx(attention, rel=1e-12)


def test_parameters_and_flops_of_finetuning_are_exact(finetune: Path):
    config = load_config(finetune, (), FinetuneConfig)
    c = config.model
    with torch.device("meta"):
        model = VideoClassifier(c, 5, impl="reference")
        flops = counted(lambda clip: model(clip).sum(), clip_of(config, 1))
    gflops = Rehearsal(config, "reference", False).gflops()
    assert gflops["Global"] * 1e9 == pytest.approx(flops, rel=1e-12)
    pixels = 2 * c.num_tokens * c.tubelet_values * c.embed_dim
    assert flops == 6 * (encoder_macs(c, c.num_tokens) + 5 * c.embed_dim) - pixels


def test_a_teacher_costs_a_forward_pass_over_all_tokens(pretrain: Path):
    features = ["objective.target=features", "objective.teacher=ema"]
    config = load_config(pretrain, features)
    gflops = Rehearsal(config, "reference", False).gflops()
    forward = 2 * encoder_macs(config.model, config.model.num_tokens)
    assert gflops["Encoder"] * 1e9 == pytest.approx(forward, rel=1e-12)
    assert gflops["Global"] == pytest.approx(gflops["Encoder"] + gflops["VideoMAE"], rel=1e-12)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_those_that_a_cpu_keeps(pretrain: Path, again: bool):
    config, num_clips, found = load_config(pretrain), 3, dict[int, int]()
    model = VideoMAE(config.model, checkpointing=again).bfloat16()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = token_mask(torch.arange(num_clips), config.model.grid, "tube", 0.75)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(clip_of(config, num_clips), mask).loss
    base, slope = Rehearsal(config, "auto", again).costs()
    kept, peak, *_ = 1e9 * (base + num_clips * slope)
    assert kept == pytest.approx(sum(found.values()), rel=0.1)
    assert kept < peak
    del loss


def test_a_file_or_its_base_says_which_stage_it_is_for(
    pretrain: Path, finetune: Path, tmp_path: Path
):
    assert plan_schema(str(pretrain)) is PretrainPlanConfig
    assert plan_schema(str(finetune)) is FinetunePlanConfig
    on_base = tmp_path / "other.yaml"
    on_base.write_text("base: finetune.yaml\noutput: elsewhere\n")
    assert plan_schema(str(on_base)) is FinetunePlanConfig
    on_base.write_text("lora: {rank: 4}\n")  # classes are those of the data
    assert plan_schema(str(on_base)) is FinetunePlanConfig


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    file = tmp_path_factory.mktemp("planner") / "pretrain.yaml"
    file.write_text(yaml.safe_dump(PRETRAIN))
    return Planner(load_config(file, (), PretrainPlanConfig))


@pytest.mark.parametrize(
    ("network", "num_gpus", "gpus_a_node", "rate"),
    [
        ("ndr400", 16, 8, 0.4),
        ("ndr400", 16, 2, 0.1),  # an adapter for each GPU
        ("hdr200", 12, 8, 0.15),  # two machines of six
        ("ethernet100", 16, 8, 0.0125),
        ("ethernet100", 16, 2, 0.0125),  # one for all
        ("ndr400", 8, 8, 0),  # nothing leaves the machine
    ],
)
def test_a_network_has_what_its_name_says_a_machine_or_a_gpu(
    planner: Planner,
    monkeypatch: pytest.MonkeyPatch,
    network: str,
    num_gpus: int,
    gpus_a_node: int,
    rate: float,
):
    config = replace(planner.config, network=network)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(planner, "config", config)
    monkeypatch.setattr(planner, "gpus_a_node", gpus_a_node)
    sent, link, between = planner.traffic(np.array([1.0, 0.5, 0.25]), num_gpus)
    assert sent == pytest.approx((2 + 0.5 + 0.25) * (num_gpus - 1) / num_gpus)
    assert link == pytest.approx(sent / 0.8 / 0.45)
    assert between == (pytest.approx(sent / 0.8 / rate) if rate else 0)
    monkeypatch.setattr(planner, "gpus_a_node", 1)
    assert planner.traffic(np.array([1.0, 0.0, 0.0]), 2)[1] == 0


def test_a_step_without_a_global_batch_may_be_of_any_size(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
):
    optim = OptimConfig(micro_batch=65_536, accumulation=1000)
    monkeypatch.setattr(planner, "config", replace(planner.config, optim=optim))
    step = planner.step(4096, 1, 0)
    assert step is not None
    assert step["micro-batch"] * step["accumulation"] == 65_536_000


def test_what_is_sent_hides_behind_a_pass_that_waits_for_the_host(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planner, "config", replace(planner.config, network="ethernet100"))
    kept, again = planner.step(64, 3, 0), planner.step(64, 3, 1)
    assert kept is not None
    assert again is not None
    assert kept["ms: waiting for the host"] > kept["ms of that between machines alone"] > 0
    assert kept["ms: communication not hidden"] == 0
    assert kept["ms a step"] < again["ms a step"]


def test_an_epoch_ends_with_its_last_whole_step(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    optim = OptimConfig(global_batch=64, epochs=10, warmup_epochs=0, drop_last_batch=True)
    monkeypatch.setattr(planner, "config", replace(planner.config, optim=optim))
    monkeypatch.setattr(planner, "num_files", 100)
    step = planner.step(8, 1, 0)
    assert step is not None
    assert step["hours of the run"] == pytest.approx(10 * step["ms a step"] / 3.6e6)
    monkeypatch.setattr(planner, "num_files", 63)
    assert planner.step(8, 1, 0) is None


def test_the_largest_micro_batch_is_the_last_that_fits(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planner.gpu, "memory", 0.5)
    room = 0.92 * 0.5
    for again in (0, 1):
        step = planner.step(8, 2, again)
        assert step is not None
        of_zero, *_ = zero_costs(
            planner.weights,
            2,
            2,
            8,
            FACTS.deepspeed | {"overlap_comm": 0, "reduce_bucket_size": 1e9},
        )
        most = int(step["largest micro-batch that fits"])
        assert sum(planner.memory(of_zero, again, most)) <= room
        assert sum(planner.memory(of_zero, again, most + 1)) > room


def test_what_an_average_of_the_weights_and_fp32_reductions_take(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
):
    plain = planner.step(8, 1, 0)
    optim = replace(planner.config.optim, ema=0.999)
    extra = {"communication_data_type": "fp32"}
    engine = replace(planner.config.engine, extra=extra)
    monkeypatch.setattr(planner, "config", replace(planner.config, optim=optim, engine=engine))
    more = planner.step(8, 1, 0)
    assert plain is not None
    assert more is not None
    for name, times in (
        ("GB: master weights and moments", 16 / 12),
        ("GB all-reduced", 2),
        ("GB: buckets of gradients", 2),
        ("GB gathered", 1),
    ):
        assert more[name] == pytest.approx(times * plain[name])


def test_zero_3_partitions_and_gathers_weights_that_are_not_trained():
    sizes = [(400_000, False), (1000, False), (300_000, True), (200_000, False), (2000, True)]
    weights = [torch.empty(size, device="meta").requires_grad_(on) for size, on in sizes]
    settings = FACTS.deepspeed | {"overlap_comm": True, "reduce_bucket_size": 1e9}
    settings["stage3_max_reuse_distance"] = 200_000
    memory, once, each = zero_costs(weights, 2, 3, 4, settings)
    # all of them in four parts, the small ones, and what is kept from the forward pass
    assert memory[0] * 1e9 == pytest.approx(2 * (903_000 / 4 + 3000 + 100_000))
    assert memory[1] * 1e9 == pytest.approx(2 * 302_000 / 4)
    assert memory[2] * 1e9 == pytest.approx(12 * 302_000 / 4)
    assert once * 1e9 == pytest.approx([0, 2 * 3000, 0])
    # the backward pass ends at the first that is trained
    gathered = 900_000 + 500_000 - 100_000
    assert each * 1e9 == pytest.approx([0, 2 * gathered, 2 * 302_000])
    masters = [zero_costs(weights, 4, stage, 1, settings)[0][2] for stage in range(4)]
    assert np.array(masters) * 1e9 == pytest.approx(302_000 * np.array([8, 12, 12, 12]))


@pytest.mark.parametrize(
    ("names", "keys", "num_files", "kind", "origin"),
    [
        (["a.mp4", "b.mp4", "c.avi"], {}, 3, "videos", "as .* has"),
        (["a.jpg", "b.png"], {}, 2, "pictures", "as .* has"),
        (["a.npy"], {}, 1, "arrays", "as .* has"),
        ([], {"source": "data/ssv2/train.txt"}, 168_913, "videos", "ASSUMED .* as ssv2 is"),
        (
            [],
            {"source": "t.csv", "root": "/Hybrid/imagenet"},
            1_281_167,
            "pictures",
            "ASSUMED .*imag",
        ),
        ([], {"source": "data/own/train.txt"}, 100_000, "videos", "ASSUMED"),
        ([], {"value_range": [0, 9]}, 100_000, "arrays", "ASSUMED"),
    ],
)
def test_a_list_that_is_here_is_counted_and_any_other_assumed_once(
    tmp_path: Path,
    names: list[str],
    keys: dict[str, object],
    num_files: int,
    kind: str,
    origin: str,
):
    if names:
        own = tmp_path / "kinetics400_some.txt"
        own.write_text("".join(f"{name} 0\n" for name in names))
        keys = {"source": str(own), "root": "/not/on/this/machine"}
    file = tmp_path / "pretrain.yaml"
    file.write_text(yaml.safe_dump({**PRETRAIN, "data": keys}))
    config = load_config(file, (), PretrainPlanConfig)
    (source,) = planned_sources(config)
    assert (source.key, source.num_files, source.kind) == ("data", num_files, kind)
    assert re.match(origin, source.origin)
    rows = loading_rows(config, [source], 1.0)
    assert [("not known" in row) for row in rows] == [kind == "arrays"] * len(rows)
    assert len(rows) == {"videos": 3, "pictures": 1, "arrays": 1}[kind]
    (source,) = planned_sources(replace(config, videos=77))
    assert (source.num_files, source.origin) == (77, "by the key videos")


def test_a_mixture_loads_each_source_in_its_share(tmp_path: Path):
    file = tmp_path / "pretrain.yaml"
    sources = {"a": {"source": "imagenet", "weight": 3}, "b": {"source": "ssv2", "weight": 1}}
    file.write_text(yaml.safe_dump({**PRETRAIN, "data": {"sources": sources}}))
    config = load_config(file, (), PretrainPlanConfig)
    pictures, video, *_ = loading_rows(config, planned_sources(config), 4.0)
    megapixels = 4 * 32 * 32 / 1e6
    cells = pictures.strip("| ").split(" | ")
    assert cells[0] == "data.sources.a: plain files"
    assert float(cells[1]) == pytest.approx(3 * (1.0 + 3.6 * megapixels), rel=1e-3)
    assert float(cells[3]) == pytest.approx(0.1 * 1_281_167 / 1e6, rel=0.01)
    assert float(cells[4]) == pytest.approx(3 * 0.1)
    cells = video.strip("| ").split(" | ")
    assert float(cells[1]) == pytest.approx(3.2 * 4 + 3.6 * megapixels, rel=1e-3)


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


def rows_of(text: str) -> dict[str, list[float]]:
    """The rows of the first table of steps."""
    lines = text.split("## A step on")[1].split("##")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {name: [float(cell) for cell in more] for name, *more in cells}


def test_a_plan_is_printed_and_written_with_a_plot(
    pretrain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "plan.md"
    wanted = "optim.global_batch=96", "videos=960", f"page={page}"
    assert status("plan", str(pretrain), "--gpus", "6", "--nodes", "2", *wanted) == 0
    text = capsys.readouterr().out
    assert page.read_text().startswith(text.rstrip())
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ndr400: 0.15 TB/s from a machine of 3 GPUs to others." in text
    assert "- data: 960 videos, by the key videos." in text
    rows = rows_of(text)
    for between, sent in zip(
        *(rows[name] for name in ("ms of that between machines alone", "GB sent by a GPU")),
        strict=True,
    ):
        assert between == pytest.approx(sent / 0.8 / 0.15, rel=1e-2)
    assert " 6 |" in text.split("## The fastest")[1].split("| ZeRO")[0]  # beside those of a scale
    assert set(rows["GPUs"]) == {6}
    assert set(rows["ZeRO stage"]) == {0, 1, 2, 3}
    for micro_batch, accumulation in zip(rows["micro-batch"], rows["accumulation"], strict=True):
        assert micro_batch * accumulation * 6 == 96
    for i, total in enumerate(rows["ms a step"]):
        times = [row[i] for name, row in rows.items() if name.startswith("ms: ")]
        assert sum(times) == pytest.approx(total, rel=1e-2)
        parts = [row[i] for name, row in rows.items() if name.startswith("GB: ")]
        assert sum(parts) == pytest.approx(2 * rows["GB: all"][i], rel=1e-2)
    assert "embed_dim: 64" in text  # the whole recipe, presets and all
    assert "Not measured" in text


def test_a_small_gpu_takes_more_accumulation_and_checkpointing_less(
    pretrain: Path, capsys: pytest.CaptureFixture[str]
):
    large = "model.height=448", "model.width=448", "model.depth=4", "model.embed_dim=1024"
    wanted = *large, "optim.global_batch=4096", "gpu=a10"
    assert status("plan", str(pretrain), *wanted) == 0
    rows = rows_of(capsys.readouterr().out)
    found = dict[tuple[float, float], float]()
    for stage, again, size in zip(
        rows["ZeRO stage"], rows["activation checkpointing"], rows["micro-batch"], strict=True
    ):
        found[stage, again] = size
    assert found[1, 0] < found[1, 1] <= 512
    assert max(rows["GB: all"]) < 24


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["gpus=7", "optim.global_batch=96"], "96 videos a step are no equal shares for 7 ranks"),
        (["gpu=h900"], "gpu"),
        (["optim.micro_bach=3"], "micro_batch"),
        (["model.depth=1", "model.embed_dim=65536", "gpu=a10"], "no room"),
        (["videos=31", "optim.drop_last_batch=true"], "31 videos do not fill one step of 256"),
        (["page=plan.png"], "page: plan.png must end with .md"),
        (
            ["engine.extra.zero_optimization.overlap_comm=null"],
            "overlap_comm: None is not a number",
        ),
        (["engine.extra.zero_optimization.reduce_bucket_size=auto"], "size: auto is not a number"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(
    pretrain: Path, capsys: pytest.CaptureFixture[str], mistake: list[str], said: str
):
    assert status("plan", str(pretrain), *mistake) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1


def test_a_file_that_is_not_there_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert status("plan", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    for base, said in (("gone.yaml", "gone.yaml: no such"), ("null", "null is not a text")):
        file.write_text(f"base: {base}\n")
        assert status("plan", str(file)) == 2
        error = capsys.readouterr().err
        assert f"{file}: base: " in error
        assert said in error


def test_a_clip_that_has_no_other_to_be_mixed_with_is_no_step(finetune: Path):
    keys = "optim.global_batch=8", "augment.mix_probability=1"
    planner = Planner(load_config(finetune, keys, FinetunePlanConfig))
    assert planner.step(8, 1, 0) is None
    assert planner.step(4, 1, 0) is not None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_is_planned(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FACTS, "scale", [8])
    # its blocks are alike
    shallow = ["model.depth=2", "freeze_blocks=0"][: 1 + ("finetune" in recipe.parts)]
    if "finetune" not in recipe.parts:
        shallow.append("model.decoder_depth=1")
    if recipe.stem == "own_videos_base":  # whose data say how many
        shallow.append("classifier.num_classes=10")
    # some are for 1 GPU or 2
    assert status("plan", str(recipe), *shallow, "--gpus", "8", "optim.global_batch=512") == 0
    assert rows_of(capsys.readouterr().out)["hours of the run"][0] > 0
