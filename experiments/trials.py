"""What the experiment does with a model: pretraining, fine-tuning, probing. Everything random is a
function of seeds and of the step.

Letters: N B clips, T frames, H W pixels, C channels, S tokens, F features, M examples, D width, K
classes.
"""

import multiprocessing
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from clips import (
    LABELLED,
    SCORED,
    SUBJECTS,
    TRAINING,
    Subject,
    default_subject,
    middle,
    photographs,
    random_crop,
)
from torch import Tensor, nn

from video_mae import ClassifierConfig, VideoClassifier, VideoMAE, load_pretrained
from video_mae.config import ObjectiveConfig
from video_mae.config.schema import Knobs, knob, require
from video_mae.convert.model_folder import save_model_folder
from video_mae.files import write_whole
from video_mae.model.masking import token_mask
from video_mae.model.vit import Encoder
from video_mae.training.feature_quality import neighbour_scores, ridge_scores
from video_mae.training.optim import Schedule, guard, parameter_groups
from video_mae.training.teacher import EncoderTeacher, MovingTeacher, Teacher

NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.1
PROBE_CROPS = 4
# streams of random numbers, beside those of clips.py
WEIGHTS, ORDER, STEP, CROPS = range(100, 104)

ArmName = Literal[
    "random",
    "pixels",
    "pixels_longer",
    "pixels_contrastive",
    "features",
    "features_contrastive",
    "ema",
    "ema_contrastive",
]


class Arm(NamedTuple):
    """How an encoder is pretrained: for times as many steps as others."""

    target: Literal["pixels", "features", "ema"]
    is_contrastive: bool
    times: int = 1


ARMS: dict[ArmName, Arm] = {
    "pixels": Arm("pixels", False),
    "pixels_longer": Arm("pixels", False, times=2),
    "pixels_contrastive": Arm("pixels", True),
    "features": Arm("features", False),
    "features_contrastive": Arm("features", True),
    "ema": Arm("ema", False),
    "ema_contrastive": Arm("ema", True),
}
# without the contrastive term, a moving average is for trials (LOG.md): two hours hold no more
COMPARED: tuple[ArmName, ...] = tuple(name for name in ARMS if name != "ema")


class ExperimentConfig(Knobs):
    """What is compared; the defaults are the experiment, other values are for trying it out."""

    output: str = knob(
        "runs/experiment", "folder of the results; the same command goes on with what is there"
    )
    workers: int = knob(
        2,
        "processes of one thread each on a CPU; on a GPU jobs run one after another in one process",
        low=1,
    )
    subject: Literal["people", "shapes"] = knob(
        default_subject(), "what moves: people (where pybullet is installed), or cut-outs"
    )
    seed: int = knob(0, "of the clips", low=0, below=2**63)
    seeds: tuple[int, ...] = knob(
        (0, 1, 2),
        "repetitions: each has its own labelled clips, head, order, augmentation and random weights",
    )
    labels_per_class: tuple[int, ...] = knob((1, 10, 100), "labelled clips of each class")
    scored_on: Literal["validation", "tuning"] = knob(
        "validation",
        "which photographs give the figures: the four of the demo's validation list; or coffee and "
        "grass, on which nothing is then trained, to try recipes out",
    )
    unlabelled_clips: int = knob(12000, "for pretraining; a seed knows the labels of some", low=1)
    scored_per_class: int = knob(80, "clips of each class that give an accuracy", low=1)
    batch: int = knob(16, "clips of a step of pretraining", low=1)
    steps: int = knob(10000, "of pretraining; the teacher of features has had as many before")
    warmup_steps: int = knob(200, "of pretraining")
    pretrain_lr: float = knob(2e-3, "peak learning rate of pretraining, as it is", above=0)
    mask_ratio: float = knob(0.5, "share of the tubes that are hidden")
    pixel_contrast: tuple[float, float] = knob((0.01, 0.03), "lambda and tau on pixels")
    feature_contrast: tuple[float, float] = knob(
        (0.05, 0.1), "lambda and tau on features, of pixels' encoder and of the moving average"
    )
    momentum: float = knob(0.996, "of the moving average at first; it grows to 1")
    negatives: Literal["clip", "batch"] = knob("clip", "of the contrastive term, as in a run")
    arms: tuple[str, ...] = knob(COMPARED, "ways of pretraining that are compared", filled=True)
    repeated: tuple[str, ...] = knob(
        ("pixels", "features", "features_contrastive"),
        "of these, whose pretraining has a second seed",
    )
    finetune_batch: int = knob(32, "clips of a step of training with labels", low=1)
    finetune_lr: float = knob(1.5e-3, "peak learning rate of fine-tuning", above=0)
    scratch_steps: tuple[int, ...] = knob(
        (250, 500, 1000),
        "of training from scratch; the best, at each number of labels, counts, and is the number "
        "of steps of fine-tuning too",
    )
    scratch_lrs: tuple[float, ...] = knob((1e-3, 2e-3, 4e-3), "its peak learning rates, likewise")
    save_interval: int = knob(
        1000, "steps of pretraining from one saved state to the next, a multiple of log_interval"
    )
    log_interval: int = knob(
        200, "steps of pretraining from one line and point of the curves to the next", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "labels_per_class", "scratch_steps", "scratch_lrs"):
            values = getattr(self, name)
            least = 0 if name == "seeds" else 1e-9
            is_set = 0 < len(values) == len(set(values)) and min(values) >= least
            require(is_set, name, values, "must be different numbers, none negative")
        require(
            self.label_counts[-1] <= self.unlabelled_clips,
            "labels_per_class",
            self.labels_per_class,
            f"labels come from unlabelled_clips = {self.unlabelled_clips}",
        )
        require(
            self.warmup_steps < self.steps,
            "warmup_steps",
            self.warmup_steps,
            f"must be below steps = {self.steps}",
        )
        require(
            self.save_interval % self.log_interval == 0,
            "save_interval",
            self.save_interval,
            f"must be a multiple of log_interval = {self.log_interval}",
        )
        for name, known in (("arms", ARMS), ("repeated", self.arms)):
            value = getattr(self, name)
            require(set(value) <= set(known), name, value, f"must be of {', '.join(known)}")
            taught = [arm for arm in ARMS if arm in value and ARMS[arm].target == "features"]
            is_taught = not taught or "pixels" in value
            require(is_taught, name, value, f"pixels teach {', '.join(taught)}")

    @property
    def shown(self) -> Subject:
        """What is seen in the clips."""
        return SUBJECTS[self.subject]

    @property
    def label_counts(self) -> list[int]:
        """Numbers of labelled clips, fewest first."""
        return [num * len(self.shown.classes) for num in sorted(self.labels_per_class)]


class Job(NamedTuple):
    """A piece of the work that gives one line of results.jsonl.

    weights: the seed of pretraining; steps, lr: of fine-tuning.
    """

    kind: Literal["pretrain", "search", "finetune", "probe"]
    arm: ArmName
    weights: int = 0
    labels: int = 0
    seed: int = 0
    steps: int = 0
    lr: float = 0.0


def job_of(line: dict[str, Any]) -> Job:
    """Whose line of results.jsonl it is."""
    return Job(*(line[name] for name in Job._fields))


def work(config: ExperimentConfig, job: Job) -> dict[str, Any]:
    """Does a job and returns its line of results.jsonl."""
    start = time.monotonic()
    match job.kind:
        case "pretrain":
            result = pretrain(config, job)
        case "search":
            # rendered are those alone that may have labels
            num = config.label_counts[-1]
            result = finetune(replace(config, scored_on="tuning", unlabelled_clips=num), job)
        case "finetune":
            result = finetune(config, job)
        case "probe":
            result = probe(config, job)
    return {**job._asdict(), **result, "seconds": round(time.monotonic() - start, 2)}


@lru_cache(maxsize=2)
def training_clips(config: ExperimentConfig) -> tuple[Tensor, Tensor]:
    """clips_NTHWC for pretraining, larger than a frame, and the label_N that it does not see."""
    train, _ = photographs(config.scored_on)
    return config.shown.render(train, TRAINING, config.unlabelled_clips, config.seed)


def labelled_clips(config: ExperimentConfig, labels: int, seed: int) -> tuple[Tensor, Tensor]:
    """clips_NTHWC and label_N of those whose labels are known to a seed, the same number of each
    class; fewer are the first of more.
    """
    clips_NTHWC, label_N = training_clips(config)
    classes = len(config.shown.classes)
    # clip n shows class n mod classes
    random = np.random.default_rng([config.seed, LABELLED, seed])
    place_G = random.permutation(len(clips_NTHWC) // classes)[: labels // classes]
    index_N = torch.from_numpy((place_G[:, None] * classes + np.arange(classes)).flatten())
    return clips_NTHWC[index_N], label_N[index_N]


@lru_cache(maxsize=2)
def scored_clips(config: ExperimentConfig) -> tuple[Tensor, Tensor]:
    """The middles clips_NTHWC and label_N of clips of photographs that nothing is trained on."""
    _, scored = photographs(config.scored_on)
    num = config.scored_per_class * len(config.shown.classes)
    clips_NTHWC, label_N = config.shown.render(scored, SCORED, num, config.seed)
    return middle(clips_NTHWC, config.shown.model.height), label_N


def pretrain(config: ExperimentConfig, job: Job) -> dict[str, Any]:
    """Trains a VideoMAE on clips without labels and saves it as models/ARM_SEED; goes on from
    states/ARM_SEED.pt. The curves are the result.
    """
    device, arm = choose_device(), ARMS[job.arm]
    state_file = Path(config.output) / "states" / f"{job.arm}_{job.weights}.pt"
    clips_NTHWC = training_clips(config)[0].to(device)
    model, teacher = _student(config, arm, job.weights)
    optimizer = make_optimizer(model, weight_decay=0.01, beta2=0.95)
    total = config.steps * arm.times
    schedule = Schedule(config.pretrain_lr, 0.0, config.warmup_steps, total)
    first, curve = 0, []
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve = state["step"], state["curve"]
        if isinstance(teacher, MovingTeacher):
            teacher.averages = state["averages"]
    losses, start, parent = [], time.monotonic(), multiprocessing.parent_process()
    for step in range(first, total):
        random = np.random.default_rng([config.seed, STEP, job.weights, step])
        index_B = torch.from_numpy(random.integers(0, len(clips_NTHWC), config.batch)).to(device)
        crop_BTHWC = random_crop(clips_NTHWC[index_B], random, config.shown.model.height)
        clip_BTHWC = config.shown.vary(crop_BTHWC, random)
        mask_seed_B = torch.from_numpy(random.integers(0, 2**62, config.batch)).to(device)
        mask = token_mask(mask_seed_B, model.grid, "tube", config.mask_ratio)
        target_BSF = None if teacher is None else teacher(clip_BTHWC)
        output = model(clip_BTHWC, mask, target_BNF=target_BSF)
        take_step(optimizer, output.loss, schedule.lr(step))
        if isinstance(teacher, MovingTeacher):
            teacher.follow(ONE_PROCESS, model.encoder, step / total)
        losses.append(
            torch.stack([output.reconstruction_loss.detach(), output.contrastive_loss.detach()])
        )
        done = step + 1
        if done % config.log_interval == 0 or done == total:
            reconstruction, contrastive = torch.stack(losses).mean(0).tolist()
            curve.append([done, reconstruction, contrastive])
            losses = []
            minutes = (time.monotonic() - start) / (done - first) * (total - done) / 60
            print(
                f"pretrain {job.arm} {job.weights} step {done} of {total} reconstruction "
                f"{reconstruction:.5f} contrastive {contrastive:.4f}; {minutes:.1f} minutes of it "
                "left",
                flush=True,
            )
            if parent and not parent.is_alive():
                raise SystemExit("the process that collects the results is gone")
        if done % config.save_interval == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "averages": getattr(teacher, "averages", {}),
                "step": done,
                "curve": curve,
            }
            write_whole(state_file, partial(torch.save, state))
    save_model_folder(model_folder(config, job.arm, job.weights), model)
    return {"curve": curve}


def _student(config: ExperimentConfig, arm: Arm, seed: int) -> tuple[VideoMAE, Teacher | None]:
    """A model with fresh weights, and what gives it its targets."""
    device, model_config = choose_device(), config.shown.model
    contrast = config.pixel_contrast if arm.target == "pixels" else config.feature_contrast
    weight, temperature = contrast
    objective = ObjectiveConfig(
        contrastive_weight=weight if arm.is_contrastive else 0.0,
        temperature=temperature,
        negatives=config.negatives,
    )
    seed_torch(config, seed)
    if arm.target == "pixels":
        return VideoMAE(model_config, replace(objective, normalize="none")).to(device), None
    folder = model_folder(config, "pixels", seed)
    named = "ema" if arm.target == "ema" else str(folder)
    objective = replace(objective, target="features", teacher=named)
    student = VideoMAE(replace(model_config, target_width=model_config.embed_dim), objective)
    student.to(device)
    if arm.target == "features":
        encoder = load_pretrained(folder, VideoMAE).encoder
        return student, EncoderTeacher(encoder, student.grid).to(device)
    encoder = Encoder(student.config, final_norm=student.config.encoder_norm)
    teacher = MovingTeacher(encoder, student.grid, torch.float32, config.momentum).to(device)
    teacher.start(ONE_PROCESS, student.encoder)
    return student, teacher


class _OneProcess:
    """What a teacher that follows asks of an engine."""

    def whole(self, _: nn.Module) -> nullcontext[None]:
        return nullcontext()


ONE_PROCESS = cast(Any, _OneProcess())


def model_folder(config: ExperimentConfig, arm: ArmName, seed: int) -> Path:
    """Where a pretrained model is kept."""
    return Path(config.output) / "models" / f"{arm}_{seed}"


def encoder_of(config: ExperimentConfig, job: Job) -> Encoder:
    """A pretrained encoder, or one with fresh weights, drawn as pretraining draws its own."""
    if job.arm != "random":
        return load_pretrained(model_folder(config, job.arm, job.weights), VideoMAE).encoder
    seed_torch(config, job.seed)
    return VideoMAE(config.shown.model).encoder


def finetune(config: ExperimentConfig, job: Job) -> dict[str, Any]:
    """Trains encoder and head on the labelled clips of a seed; the accuracy of the last weights is
    the result.
    """
    device, shown = choose_device(), config.shown
    labelled = labelled_clips(config, job.labels, job.seed)
    clips_NTHWC, label_N = (part.to(device) for part in labelled)
    weights = encoder_of(config, job).state_dict()
    seed_torch(config, job.seed)
    head = ClassifierConfig(num_classes=len(shown.classes), head_init_scale=1.0)
    model = VideoClassifier(shown.model, head)
    # fc_norm instead
    model.encoder.load_state_dict(
        {name: value for name, value in weights.items() if not name.startswith("norm.")}
    )
    model.to(device).train()
    optimizer = make_optimizer(model, weight_decay=0.05, beta2=0.999)
    schedule = Schedule(job.lr, 0.0, job.steps // 10, job.steps)
    order = np.random.default_rng([config.seed, ORDER, job.seed])
    passes = -(-job.steps * config.finetune_batch // job.labels)
    index = torch.from_numpy(np.concatenate([order.permutation(job.labels) for _ in range(passes)]))
    losses = []
    for step in range(job.steps):
        random = np.random.default_rng([config.seed, STEP, job.seed, step])
        index_B = index[step * config.finetune_batch :][: config.finetune_batch].to(device)
        clip_BTHWC = random_crop(clips_NTHWC[index_B], random, shown.model.height)
        logits_BK = model(shown.vary(clip_BTHWC, random))
        loss = F.cross_entropy(logits_BK, label_N[index_B], label_smoothing=0.1)
        take_step(optimizer, loss, schedule.lr(step))
        losses.append(loss.detach())
    model.eval()
    scored_NTHWC, scored_label_N = scored_clips(config)
    with torch.no_grad():
        logits_NK = torch.cat([model(part.to(device)) for part in scored_NTHWC.split(128)])
    return {
        "top1": {"fine-tuned": top1(logits_NK, scored_label_N)},
        "training_loss": torch.stack(losses[-20:]).mean().item(),
    }


def probe(config: ExperimentConfig, job: Job) -> dict[str, Any]:
    """The accuracies of two readers of the frozen encoder's features, averaged over the tokens of a
    clip, and over random crops of a labelled one: a linear one (ridge regression) and nearest
    neighbours.
    """
    device, shown = choose_device(), config.shown
    clips_NTHWC, label_N = labelled_clips(config, job.labels, job.seed)
    scored_NTHWC, scored_label_N = scored_clips(config)
    encoder = encoder_of(config, job).to(device).eval()
    random = np.random.default_rng([config.seed, CROPS, job.seed])
    views = []
    for _ in range(PROBE_CROPS):
        crop_MTHWC = shown.vary(random_crop(clips_NTHWC, random, shown.model.height), random)
        views.append(_features(encoder, crop_MTHWC))
    example_MD, scored_ND = torch.stack(views).mean(0), _features(encoder, scored_NTHWC)
    label_M, num_classes = label_N.to(device), len(shown.classes)
    mean_D, std_D = example_MD.mean(0), example_MD.std(0) + 1e-4
    example_MD, scored_ND = (example_MD - mean_D) / std_D, (scored_ND - mean_D) / std_D
    neighbours = neighbour_scores(
        scored_ND, example_MD, label_M, num_classes, [NEIGHBOURS], NEIGHBOUR_TEMPERATURE
    )[0]
    linear = ridge_scores(scored_ND, example_MD, label_M, num_classes)
    return {
        "top1": {
            "linear": top1(linear, scored_label_N),
            "nearest neighbours": top1(neighbours, scored_label_N),
        }
    }


@torch.no_grad()
def _features(encoder: Encoder, clips_NTHWC: Tensor) -> Tensor:
    device = choose_device()
    return torch.cat([encoder(part.to(device)).mean(1) for part in clips_NTHWC.split(128)])


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


def top1(logits_NK: Tensor, label_N: Tensor) -> float:
    """The share of clips whose largest score is that of their label."""
    return (logits_NK.argmax(1).cpu() == label_N).float().mean().item()


def seed_torch(config: ExperimentConfig, seed: int) -> None:
    """For first weights: drawn on the CPU, so the same on every device."""
    torch.manual_seed(int(np.random.default_rng([config.seed, WEIGHTS, seed]).integers(2**62)))


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
