"""Does masked pretraining help where labels are few? `make experiment` answers with figures;
README.md says how to read them.

Every competitor gets the same labelled clips, augmentation and steps, and is scored on clips of
photographs that none of them has seen. Everything random is a function of seeds and of the step, so
a run that was stopped goes on as if it had not.

Letters: N B clips, T frames, H W pixels, C channels, V crops of a clip, S tokens, D features, K
shapes.
"""

import json
import multiprocessing
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accuracy_report import write_report
from shapes import SHAPES, ShapeClipsConfig, render_clips
from torch import Tensor, nn

from video_mae import ClassifierConfig, ModelConfig, VideoClassifier, VideoMAE, load_pretrained
from video_mae.config import ObjectiveConfig
from video_mae.config.schema import Knobs, describe, knob, parse, require, to_dict
from video_mae.convert.model_folder import save_model_folder
from video_mae.evaluation.heads import (
    AttentiveHead,
    HeadGrid,
    LinearHead,
    Setting,
)
from video_mae.files import read_jsonl, write_whole
from video_mae.model.masking import token_mask
from video_mae.model.vit import Encoder
from video_mae.tools.demo import PHOTOGRAPHS
from video_mae.training.feature_quality import neighbour_scores
from video_mae.training.optim import Schedule, guard, parameter_groups

MODEL = ModelConfig(
    num_frames=8,
    height=32,
    width=32,
    tubelet_size=2,
    patch_size=8,
    embed_dim=96,
    depth=4,
    num_heads=3,
    decoder_embed_dim=64,
    decoder_depth=2,
    decoder_num_heads=2,
    mean=(0.5,),
    std=(0.25,),
)
# of the training photographs: the recipe was chosen by scores on these
TUNING_PHOTOGRAPHS = ("coffee.png", "grass.png")
FREE_KEYS = ("output", "workers")  # other values of these give the same results
LINEAR, ATTENTIVE = Setting(lr=1e-2, weight_decay=0.01), Setting(lr=1e-3, weight_decay=0.05)
PROBE_BATCH, PROBE_CROPS = 64, 4
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.1
# CPU seconds of a step, a step, a job on one machine: their ratio counts
COST = {"pretrain": 0.06, "finetune": 0.1, "probe": 4.5}
# streams of random numbers; LABELLED + seed is the last
UNLABELLED, SCORED, WEIGHTS, ORDER, STEP, CROPS, LABELLED = range(7)

Arm = Literal["plain", "contrastive", "random"]
ARMS: tuple[Arm, ...] = ("plain", "contrastive", "random")


class ExperimentConfig(Knobs):
    """What is compared; the defaults are the experiment, other values are for trying it out."""

    output: str = knob(
        "runs/experiment", "folder of the results; the same command goes on with what is there"
    )
    workers: int = knob(
        2,
        "processes of one thread each on a CPU; on a GPU jobs run one after another in one process",
    )
    seed: int = knob(0, "of the clips and of pretraining")
    seeds: tuple[int, ...] = knob(
        (0, 1, 2),
        "repetitions: each has its own labelled clips, head, order, augmentation and random weights",
    )
    labels: tuple[int, ...] = knob(
        (32, 64, 128, 256, 512), "numbers of labelled clips, multiples of the 8 shapes"
    )
    scored_on: Literal["validation", "tuning"] = knob(
        "validation",
        "which photographs give the figures: the four of the demo's validation "
        "list; or coffee and grass, on which nothing is then trained, to try recipes out",
    )
    unlabelled_clips: int = knob(
        12000, "clips for pretraining, rendered once, cropped anew each time"
    )
    scored_clips: int = knob(1024, "clips that give an accuracy, a multiple of the 8 shapes")
    batch: int = knob(32, "clips of a step, in pretraining and in fine-tuning")
    steps: int = knob(12000, "of pretraining")
    warmup_steps: int = knob(200, "of pretraining")
    pretrain_lr: float = knob(3e-3, "peak learning rate of pretraining, as it is")
    mask_ratio: float = knob(0.75, "share of the tubes that are hidden")
    contrastive_weight: float = knob(0.01, "lambda of the second pretraining; the first has 0")
    temperature: float = knob(0.03, "tau of the second pretraining")
    finetune_steps: int = knob(250, "of every fine-tuning, pretrained or not")
    finetune_lr: float = knob(1.5e-3, "peak learning rate of fine-tuning pretrained weights")
    scratch_lr: float = knob(2e-3, "peak learning rate of training from random weights")
    linear_steps: int = knob(300, "of the linear head on frozen features, 64 crops each")
    attentive_steps: int = knob(200, "of the attentive head, likewise")
    save_interval: int = knob(
        1000, "steps of pretraining from one saved state to the next, a multiple of log_interval"
    )
    log_interval: int = knob(
        200, "steps of pretraining from one line and point of the curves to the next"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "workers",
            "unlabelled_clips",
            "batch",
            "steps",
            "finetune_steps",
            "linear_steps",
            "attentive_steps",
            "save_interval",
            "log_interval",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")
        require(
            len(self.seeds) > 0
            and min(self.seeds) >= 0
            and len(set(self.seeds)) == len(self.seeds),
            "seeds",
            self.seeds,
            "must be different numbers, at least 0",
        )
        require(
            len(self.labels) > 0 and all(n > 0 and n % len(SHAPES) == 0 for n in self.labels),
            "labels",
            self.labels,
            f"must be positive multiples of the {len(SHAPES)} shapes",
        )
        require(
            self.scored_clips > 0 and self.scored_clips % len(SHAPES) == 0,
            "scored_clips",
            self.scored_clips,
            f"must be a positive multiple of the {len(SHAPES)} shapes",
        )
        require(
            0 <= self.warmup_steps < self.steps,
            "warmup_steps",
            self.warmup_steps,
            f"must be at least 0, below steps = {self.steps}",
        )
        require(
            self.save_interval % self.log_interval == 0,
            "save_interval",
            self.save_interval,
            f"must be a multiple of log_interval = {self.log_interval}",
        )
        for name in ("pretrain_lr", "finetune_lr", "scratch_lr", "contrastive_weight"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")


class Job(NamedTuple):
    """A piece of the work that gives one line of results.jsonl."""

    kind: Literal["pretrain", "finetune", "probe"]
    arm: Arm
    labels: int = 0
    seed: int = 0


def all_jobs(config: ExperimentConfig) -> list[Job]:
    """Pretraining first, then what needs none, then the rest."""
    pretrained: list[Arm] = ["plain", "contrastive"]
    return [
        *(Job("pretrain", arm) for arm in pretrained),
        *(
            Job(kind, arm, labels, seed)
            for arm in ("random", *pretrained)
            for kind in ("finetune", "probe")
            for labels in config.labels
            for seed in config.seeds
        ),
    ]


def photographs(config: ExperimentConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the photographs to train on, and of those that give the figures."""
    if config.scored_on == "validation":
        return PHOTOGRAPHS["train"], PHOTOGRAPHS["val"]
    return tuple(
        name for name in PHOTOGRAPHS["train"] if name not in TUNING_PHOTOGRAPHS
    ), TUNING_PHOTOGRAPHS


@lru_cache(maxsize=1)
def unlabelled_clips(config: ExperimentConfig) -> Tensor:
    """clips_NTHWC for pretraining, larger than a frame."""
    return render_clips(
        photographs(config)[0],
        UNLABELLED,
        config.unlabelled_clips,
        ShapeClipsConfig(seed=config.seed),
    )[0]


@lru_cache(maxsize=8)
def labelled_clips(config: ExperimentConfig, seed: int) -> tuple[Tensor, Tensor]:
    """clips_NTHWC and label_N of a seed: the first n of them, balanced, are what n labels give."""
    return render_clips(
        photographs(config)[0],
        LABELLED + seed,
        max(config.labels),
        ShapeClipsConfig(seed=config.seed),
    )


@lru_cache(maxsize=1)
def scored_clips(config: ExperimentConfig) -> tuple[Tensor, Tensor]:
    """The middles clips_NTHWC and label_N of clips of photographs that nothing is trained on."""
    clips_NTHWC, label_N = render_clips(
        photographs(config)[1], SCORED, config.scored_clips, ShapeClipsConfig(seed=config.seed)
    )
    start = (clips_NTHWC.shape[2] - MODEL.height) // 2
    return clips_NTHWC[
        :, :, start : start + MODEL.height, start : start + MODEL.width
    ].contiguous(), label_N


def random_crop(clips_BTHWC: Tensor, random: np.random.Generator) -> Tensor:
    """One box of the model's size out of all frames of a clip."""
    corners_B2 = random.integers(
        0, clips_BTHWC.shape[2] - MODEL.height + 1, (len(clips_BTHWC), 2)
    ).tolist()
    return torch.stack(
        [
            clip[:, y : y + MODEL.height, x : x + MODEL.width]
            for clip, (y, x) in zip(clips_BTHWC, corners_B2, strict=True)
        ]
    )


def recolour(clips_BTHWC: Tensor, random: np.random.Generator) -> Tensor:
    """Floats in [0, 1]: channels in any order, half of the clips negatives, contrast and brightness
    by channel; alike for all frames.
    """
    num, device = len(clips_BTHWC), clips_BTHWC.device
    order_BC = torch.from_numpy(random.permuted(np.tile(np.arange(3), (num, 1)), axis=1)).to(device)
    negative_B = torch.from_numpy(random.random(num) < 0.5).to(device)
    gain_BC = torch.from_numpy(np.exp(random.uniform(-0.5, 0.5, (num, 3)))).float().to(device)
    offset_BC = torch.from_numpy(random.uniform(-0.3, 0.3, (num, 3))).float().to(device)
    x = clips_BTHWC.float() / 255 - 0.5
    x = x.gather(-1, order_BC[:, None, None, None].expand(x.shape))
    x = torch.where(negative_B[:, None, None, None, None], -x, x)
    return (x * gain_BC[:, None, None, None] + offset_BC[:, None, None, None] + 0.5).clamp(0, 1)


def make_optimizer(model: nn.Module, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """The library's AdamW and groups."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), betas=(0.9, beta2), fused=True)


def take_step(optimizer: torch.optim.AdamW, loss: Tensor, lr: float) -> None:
    """One update at a learning rate, gradients clipped at 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    loss.backward()
    gradients = [
        weight.grad
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.grad is not None
    ]
    guard(optimizer, gradients, clip_grad=1.0, partitioned=False)
    optimizer.step()


def pretrain(config: ExperimentConfig, arm: Arm) -> dict[str, Any]:
    """Trains a VideoMAE on clips without labels and saves it as models/ARM; goes on from
    states/ARM.pt. The curves are the result.
    """
    device = choose_device()
    state_file = Path(config.output) / "states" / f"{arm}.pt"
    clips_NTHWC = unlabelled_clips(config).to(device)
    seed_torch(config, config.seed)
    objective = ObjectiveConfig(
        normalize="none",
        contrastive_weight=config.contrastive_weight if arm == "contrastive" else 0.0,
        temperature=config.temperature,
    )
    model = VideoMAE(MODEL, objective).to(device)
    optimizer = make_optimizer(model, weight_decay=0.01, beta2=0.95)
    schedule = Schedule(config.pretrain_lr, 0.0, config.warmup_steps, config.steps)
    first, curve = 0, []
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve = state["step"], state["curve"]
    losses, start, parent = [], time.monotonic(), multiprocessing.parent_process()
    for step in range(first, config.steps):
        random = np.random.default_rng([config.seed, STEP, step])
        index_B = torch.from_numpy(random.integers(0, len(clips_NTHWC), config.batch)).to(device)
        clip_BTHWC = random_crop(clips_NTHWC[index_B], random)
        mask_seed_B = torch.from_numpy(random.integers(0, 2**62, config.batch)).to(device)
        output = model(clip_BTHWC, token_mask(mask_seed_B, model.grid, "tube", config.mask_ratio))
        take_step(optimizer, output.loss, schedule.lr(step))
        losses.append(
            torch.stack([output.reconstruction_loss.detach(), output.contrastive_loss.detach()])
        )
        done = step + 1
        if done % config.log_interval == 0 or done == config.steps:
            reconstruction, contrastive = torch.stack(losses).mean(0).tolist()
            curve.append([done, reconstruction, contrastive])
            losses = []
            minutes = (time.monotonic() - start) / (done - first) * (config.steps - done) / 60
            print(
                f"pretrain {arm} step {done} of {config.steps} reconstruction {reconstruction:.5f} contrastive {contrastive:.4f}; "
                f"{minutes:.1f} minutes of pretraining left",
                flush=True,
            )
            if parent and not parent.is_alive():
                raise SystemExit("the process that collects the results is gone")
        if done % config.save_interval == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "curve": curve,
            }
            write_whole(state_file, partial(torch.save, state))
    save_model_folder(model_folder(config, arm), model)
    return {"curve": curve}


def model_folder(config: ExperimentConfig, arm: Arm) -> Path:
    """Where a pretrained model is kept."""
    return Path(config.output) / "models" / arm


def encoder_of(config: ExperimentConfig, arm: Arm, seed: int) -> Encoder:
    """A pretrained encoder, or one with fresh weights, drawn as pretraining draws its own."""
    if arm != "random":
        return load_pretrained(model_folder(config, arm), VideoMAE).encoder
    seed_torch(config, seed)
    return VideoMAE(MODEL).encoder


def finetune(config: ExperimentConfig, arm: Arm, labels: int, seed: int) -> dict[str, Any]:
    """Trains encoder and head on the labelled clips of a seed; the accuracy of the last weights is
    the result.
    """
    device = choose_device()
    clips_NTHWC, label_N = (part[:labels].to(device) for part in labelled_clips(config, seed))
    weights = encoder_of(config, arm, seed).state_dict()
    seed_torch(config, seed)
    model = VideoClassifier(MODEL, ClassifierConfig(num_classes=len(SHAPES), head_init_scale=1.0))
    # fc_norm instead
    model.encoder.load_state_dict(
        {name: value for name, value in weights.items() if not name.startswith("norm.")}
    )
    model.to(device).train()
    optimizer = make_optimizer(model, weight_decay=0.05, beta2=0.999)
    peak = config.scratch_lr if arm == "random" else config.finetune_lr
    schedule = Schedule(peak, 0.0, config.finetune_steps // 10, config.finetune_steps)
    order = np.random.default_rng([config.seed, ORDER, seed])
    passes = -(-config.finetune_steps * config.batch // labels)
    index = torch.from_numpy(np.concatenate([order.permutation(labels) for _ in range(passes)]))
    losses = []
    for step in range(config.finetune_steps):
        random = np.random.default_rng([config.seed, STEP, seed, step])
        index_B = index[step * config.batch : (step + 1) * config.batch].to(device)
        clip_BTHWC = recolour(random_crop(clips_NTHWC[index_B], random), random)
        loss = F.cross_entropy(model(clip_BTHWC), label_N[index_B], label_smoothing=0.1)
        take_step(optimizer, loss, schedule.lr(step))
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        scored_NTHWC, scored_label_N = scored_clips(config)
        logits_NK = torch.cat(
            [model(clip_BTHWC.to(device)) for clip_BTHWC in scored_NTHWC.split(128)]
        )
    return {
        "top1": {"fine-tuned": top1(logits_NK, scored_label_N)},
        "training_loss": torch.stack(losses[-20:]).mean().item(),
    }


def probe(config: ExperimentConfig, arm: Arm, labels: int, seed: int) -> dict[str, Any]:
    """The accuracies of three readers of the frozen encoder's features: a linear head, an attentive
    head, nearest neighbours.
    """
    device, width = choose_device(), MODEL.embed_dim
    clips_NTHWC, label_N = (part[:labels] for part in labelled_clips(config, seed))
    scored_NTHWC, scored_label_N = scored_clips(config)
    encoder = encoder_of(config, arm, seed).to(device).eval()
    crops = np.random.default_rng([config.seed, CROPS, seed])
    crops_MTHWC = torch.cat([random_crop(clips_NTHWC, crops) for _ in range(PROBE_CROPS)])
    label_M = label_N.repeat(PROBE_CROPS).to(device)
    with torch.no_grad():
        tokens_MSD, scored_NSD = (
            torch.cat([encoder(part.to(device)) for part in clips_BTHWC.split(128)])
            for clips_BTHWC in (crops_MTHWC, scored_NTHWC)
        )
    pooled_MD, scored_ND = standardise(tokens_MSD.mean(1), scored_NSD.mean(1))
    tokens_MSD, scored_NSD = standardise(tokens_MSD, scored_NSD)
    linear, attentive = (
        partial(LinearHead, width, len(SHAPES)),
        partial(AttentiveHead, width, len(SHAPES), MODEL.num_heads),
    )
    scores = {
        "nearest neighbours": neighbour_scores(
            scored_ND, pooled_MD, label_M, len(SHAPES), [NEIGHBOURS], NEIGHBOUR_TEMPERATURE
        )[0]
    }
    for name, make, setting, steps, x, scored in (
        ("linear", linear, LINEAR, config.linear_steps, pooled_MD, scored_ND),
        ("attentive", attentive, ATTENTIVE, config.attentive_steps, tokens_MSD, scored_NSD),
    ):
        seed_torch(config, seed)
        head = HeadGrid(make, width, [setting]).to(device)
        for step in range(steps):
            random = np.random.default_rng([config.seed, STEP, seed, step])
            index_B = torch.from_numpy(random.integers(0, len(x), PROBE_BATCH)).to(device)
            head.step(x[index_B], label_M[index_B], step / steps)
        scores[name] = head.logits(scored)[0]
    return {
        "top1": {
            name: top1(scores[name], scored_label_N)
            for name in ("linear", "attentive", "nearest neighbours")
        }
    }


def standardise(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with mean 0 and deviation 1 in each feature of the first: the statistics of labelled
    clips alone.
    """
    features = x.flatten(0, -2)
    mean_D, std_D = features.mean(0), features.std(0) + 1e-4
    return (x - mean_D) / std_D, (other - mean_D) / std_D


def top1(logits_NK: Tensor, label_N: Tensor) -> float:
    """The share of clips whose largest score is that of their label."""
    return (logits_NK.argmax(1).cpu() == label_N).float().mean().item()


def seed_torch(config: ExperimentConfig, seed: int) -> None:
    """For first weights: drawn on the CPU, so the same on every device."""
    torch.manual_seed(int(np.random.default_rng([config.seed, WEIGHTS, seed]).integers(2**62)))


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def work(config: ExperimentConfig, job: Job) -> dict[str, Any]:
    """Does a job and returns its line of results.jsonl."""
    start = time.monotonic()
    match job.kind:
        case "pretrain":
            result = pretrain(config, job.arm)
        case "finetune":
            result = finetune(config, job.arm, job.labels, job.seed)
        case "probe":
            result = probe(config, job.arm, job.labels, job.seed)
    return {**job._asdict(), **result, "seconds": round(time.monotonic() - start, 2)}


def finished(config: ExperimentConfig, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """The lines of jobs as these end: in this process, or in workers of one thread each, none
    before the pretraining that it needs.
    """
    if config.workers == 1 or choose_device().type == "cuda":
        for job in jobs:
            yield work(config, job)
        return
    waiting, running = list(jobs), dict[Future[dict[str, Any]], Job]()
    with ProcessPoolExecutor(
        config.workers, multiprocessing.get_context("spawn"), _start_worker
    ) as pool:
        try:
            while waiting or running:
                missing = {
                    job.arm for job in (*waiting, *running.values()) if job.kind == "pretrain"
                }
                ready = [job for job in waiting if job.kind == "pretrain" or job.arm not in missing]
                for job in ready[: config.workers - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(work, config, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    yield future.result()
        except BaseException:
            # an interruption too: nobody would collect what the workers go on to do
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others


def header(config: ExperimentConfig) -> dict[str, Any]:
    """The first line of results.jsonl."""
    device = choose_device()
    settings = {name: value for name, value in to_dict(config).items() if name not in FREE_KEYS}
    train, scored = photographs(config)
    return {
        "config": settings,
        "photographs": {"train": train, "scored": scored},
        "model": to_dict(MODEL),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "numpy", "scikit-image", "pillow")},
    }


def run(config: ExperimentConfig) -> str:
    """Does what is not yet done, writes all files into the output folder and returns the table.

    Raises: ValueError where the folder holds the results of other settings.
    """
    folder = Path(config.output)
    results, first = folder / "results.jsonl", header(config)
    lines = read_jsonl(results)
    if lines and lines[0]["config"] != first["config"]:
        changed = ", ".join(
            name for name, value in first["config"].items() if lines[0]["config"].get(name) != value
        )
        raise ValueError(
            f"{results}: holds results of other settings ({changed}): name another folder as output=..., or remove this one"
        )
    lines = lines or [first]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(results, lambda path: _write_lines(path, lines))  # without a line that a crash tore
    jobs = all_jobs(config)
    done = {Job(line["kind"], line["arm"], line["labels"], line["seed"]) for line in lines[1:]}
    left, now = [job for job in jobs if job not in done], []
    for line in finished(config, left):
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        now.append(line)
        print(_progress(config, line, now, left, len(jobs)), flush=True)
    return write_report(folder, lines)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _progress(
    config: ExperimentConfig,
    line: dict[str, Any],
    now: Sequence[dict[str, Any]],
    left: Sequence[Job],
    total: int,
) -> str:
    def cost(kind: str) -> float:
        return (
            COST[kind]
            * {"pretrain": config.steps, "finetune": config.finetune_steps, "probe": 1}[kind]
        )

    spent = sum(cost(done["kind"]) for done in now)
    rate = (
        sum(done["seconds"] for done in now)
        / spent
        / (1 if choose_device().type == "cuda" else config.workers)
    )
    minutes = rate * (sum(cost(job.kind) for job in left) - spent) / 60
    result = ", ".join(f"{name} {value:.1%}" for name, value in line.get("top1", {}).items())
    what = f"{line['kind']} {line['arm']}" + (
        f" {line['labels']} labels seed {line['seed']}: {result}" if result else ""
    )
    return f"{total - len(left) + len(now)} of {total} jobs; {what}; {line['seconds']:.0f} s; about {minutes:.0f} minutes left"


def main(arguments: Sequence[str]) -> int:
    """The experiment with `key=value` changes. Returns 0; 2 for a mistake in these; 130 where it
    was interrupted.
    """
    if {"-h", "--help"} & set(arguments):
        print(describe(ExperimentConfig))
        return 0
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = parse(None, arguments, ExperimentConfig)
        table = run(config)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{table}\nresults {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
