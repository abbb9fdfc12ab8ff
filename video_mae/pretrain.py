"""The pretraining stage: everything that can be wrong is checked in `prepare`, before any process group starts; `run` trains."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_mae.config import DataConfig, PretrainConfig, load_config
from video_mae.data.annotations import read_annotations
from video_mae.data.dataset import Batch, ClipDataset, collate
from video_mae.data.loader import make_loader
from video_mae.data.sampling import StepSampler, sample_seed
from video_mae.engine import Engine, check_resumable, deepspeed_config, leave, world_from_environment
from video_mae.journal import Journal
from video_mae.kernels.dispatch import describe
from video_mae.masking import TokenMask, mask_counts, token_mask
from video_mae.model import VideoMAE, pretraining_macs
from video_mae.optim import Schedule, make_schedule
from video_mae.picture import draw_reconstruction
from video_mae.report import write_report
from video_mae.schema import flatten, save_config
from video_mae.weights import save_model_folder

if TYPE_CHECKING:
    from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

DONE, STOPPED_BY_POLICY = 0, 3
FIRST_VERDICT = 100  # videos tried before the share of bad ones can stop a run

# What may change when a run folder is started again; anything else would silently make it another run.
FREE_KEYS = ("output", "journal.", "data.num_workers", "data.prefetch_batches", "data.max_bad_share", "engine.compile", "engine.kernels",
             "engine.activation_checkpointing", "engine.max_skipped_in_a_row")


@dataclass(frozen=True)
class Plan:
    """A checked run."""

    config: PretrainConfig
    run_folder: Path
    videos: "LabeledVideoPaths"
    schedule: Schedule
    schedule_line: str
    num_visible: int
    num_masked: int
    deepspeed: dict[str, Any]


def start(config: PretrainConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is returned."""
    plan = prepare(config)

    def train() -> int:
        status = run(plan)
        leave()
        return status

    return train


def prepare(config: PretrainConfig) -> Plan:
    """Checks configuration, mask, lists and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    _, world_size = world_from_environment()
    run_folder = Path(config.output)
    if config.engine.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("engine.precision: fp16 needs a GPU; use bf16 or fp32")
    try:
        describe(config.engine.kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise ValueError(f"engine.kernels: {error}") from None
    mask = config.mask
    num_visible, num_masked = mask_counts(config.model.grid, mask.kind, mask.ratio, mask.decoder_mask_ratio)
    if config.objective.contrastive_weight > 0 and num_masked < 2 and config.objective.negatives == "clip":
        raise ValueError("objective.contrastive_weight: a clip has 1 masked tubelet, so nothing to contrast; raise mask.ratio")
    _check_run_folder(config, run_folder)
    check_resumable(run_folder, config.engine, world_size)
    videos = read_annotations(config.data)
    schedule, line = make_schedule(config.optim, len(videos), world_size, config.data.clips_per_video)
    deepspeed = deepspeed_config(config.engine, config.optim, config.journal, clips_per_video=config.data.clips_per_video,
                                 world_size=world_size, run_folder=run_folder)
    return Plan(config, run_folder, videos, schedule, line, num_visible, num_masked, deepspeed)


def run(plan: Plan) -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit status.

    0 done; 3 stopped because too many videos or steps were bad; 128 + number stopped by a signal, with a checkpoint.
    """
    config, folder = plan.config, plan.run_folder
    torch.manual_seed(config.seed)
    model = VideoMAE(config.model, config.objective, impl=config.engine.kernels, checkpointing=config.engine.activation_checkpointing)
    engine = Engine(model, config.engine, config.optim, plan.deepspeed, folder)
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        (folder / "deepspeed.json").write_text(json.dumps(plan.deepspeed, indent=2) + "\n")
    first_step = engine.resume()
    clips = config.optim.micro_batch * config.data.clips_per_video * config.optim.accumulation * engine.world_size
    journal = Journal(
        folder, is_main=engine.rank == 0, total_steps=plan.schedule.total_steps, log_interval=config.journal.log_interval,
        clips_per_step=clips, flops_per_clip=6 * pretraining_macs(config.model, plan.num_visible, plan.num_masked),
        num_devices=engine.world_size, device=engine.device, precision=config.engine.precision, write_events=engine.write_events,
        reduce_mean=engine.mean, resumed_step=first_step)
    try:
        return _Training(plan, engine, journal, model).train(first_step)
    finally:
        journal.close()


class _Training:
    """The loop and what hangs on it."""

    def __init__(self, plan: Plan, engine: Engine, journal: Journal, model: VideoMAE) -> None:
        self.plan, self.config, self.engine, self.journal, self.model = plan, plan.config, engine, journal, model
        self.videos_per_step = self.config.optim.micro_batch * self.config.optim.accumulation * engine.world_size
        self.examples: Batch | None = None
        self.skipped_in_a_row = 0

    def train(self, first_step: int) -> int:
        config, engine, journal, total = self.config, self.engine, self.journal, self.plan.schedule.total_steps
        self._introduce(first_step)
        skipped = self.engine.deepspeed.skipped_steps
        batches = iter(self._loader(first_step, total))
        for step in range(first_step, total):
            if config.model.drop_path > 0:  # stateless as the rest: a resumed run drops the same paths
                torch.manual_seed(sample_seed(config.seed, step, engine.rank, 0))
            loss, reconstruction, contrastive = self._accumulate(batches).unbind()
            lr = self.plan.schedule.lr(step)
            result = engine.step(lr)
            done = step + 1
            journal.step(done, done * self.videos_per_step / len(self.plan.videos), loss, reconstruction, contrastive, lr,
                         result.grad_norm, result.skipped_steps)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped_steps > skipped else 0
            if result.skipped_steps > skipped:
                journal.say(f"step {done}: skipped, a loss or gradient was not finite ({self.skipped_in_a_row} in a row)")
            skipped = result.skipped_steps
            reason = self._reason_to_stop(done)
            if reason:
                journal.say(f"stopped at step {done}: {reason}")
                return STOPPED_BY_POLICY
            ending = done == total or result.signal != 0
            if ending or _due(done, config.journal.picture_interval):
                self._draw(done)
            if ending or _due(done, config.journal.checkpoint_interval):
                self._save(done)
            if result.signal and done < total:
                journal.say(f"stopped by signal {result.signal} after step {done}; start the same command again to go on")
                return 128 + result.signal
        if engine.rank == 0:
            self._conclude(write_report(self.plan.run_folder))
        return DONE

    def _accumulate(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Forward and backward of one step's micro-batches; returns the mean [loss, reconstruction, contrastive]."""
        total = torch.zeros(3, device=self.engine.device)
        num = self.config.optim.accumulation
        for micro in range(num):
            with self.journal.data_wait():
                batch = next(batches)
            self.journal.quarantine.add(batch.failures)
            batch = batch.to(self.engine.device)
            output = self.engine(batch.clip_BTHWC, self._mask(batch.seeds_B))
            self.engine.backward(output.loss, last=micro == num - 1)
            total += torch.stack([output.loss, output.reconstruction_loss, output.contrastive_loss]).detach() / num
        return total

    def _mask(self, seeds_B: torch.Tensor, *, whole: bool = False) -> TokenMask:
        mask = self.config.mask
        return token_mask(seeds_B, self.config.model.grid, mask.kind, mask.ratio, 0.0 if whole else mask.decoder_mask_ratio)

    def _dataset(self, data: DataConfig) -> ClipDataset:
        model = self.config.model
        return ClipDataset(self.plan.videos, data, model.num_frames, model.height, model.width, self.config.seed)

    def _loader(self, first_step: int, last_step: int) -> Any:
        optim = self.config.optim
        sampler = StepSampler(len(self.plan.videos), optim.micro_batch, optim.accumulation, self.engine.rank, self.engine.world_size,
                              self.config.seed, first_step, last_step)
        return make_loader(self._dataset(self.config.data), sampler, self.config.data, pin=self.engine.device.type == "cuda")

    def _reason_to_stop(self, done: int) -> str:
        if self.skipped_in_a_row >= self.config.engine.max_skipped_in_a_row:
            return (f"{self.skipped_in_a_row} steps in a row were not finite; the last checkpoint is from before them: lower "
                    "optim.base_lr, set optim.clip_grad or use another engine.precision")
        if done % self.config.journal.log_interval and done != self.plan.schedule.total_steps:
            return ""
        bad = self.engine.gather(len(self.journal.quarantine))[0]
        tried = min(done * self.videos_per_step + bad, len(self.plan.videos))
        if bad <= self.config.data.max_bad_share * tried or tried < min(FIRST_VERDICT, len(self.plan.videos)):
            return ""
        return (f"{bad} of about {tried} videos tried could not be decoded, more than data.max_bad_share = "
                f"{self.config.data.max_bad_share}; they are named in {self.plan.run_folder / 'quarantine.jsonl'}")

    def _draw(self, done: int) -> None:
        if self.examples is None:
            videos, num = len(self.plan.videos), min(self.config.journal.picture_clips, len(self.plan.videos))
            dataset = self._dataset(replace(self.config.data, clips_per_video=1))
            self.examples = collate([dataset[(0, i * videos // num)] for i in range(num)]).to(self.engine.device)
        clip_BTHWC, mask = self.examples.clip_BTHWC, self._mask(self.examples.seeds_B, whole=True)
        predicted_BMP = self.engine.evaluate(clip_BTHWC, mask).predicted_BMP
        if self.engine.rank == 0:
            names = [Path(self.plan.videos[int(index)][0]).name for index in self.examples.index_B]
            draw_reconstruction(self.plan.run_folder / "reconstructions" / f"step_{done:08d}.png", clip_BTHWC.cpu(), mask.visible_BV.cpu(),
                                mask.masked_BM.cpu(), predicted_BMP.float().cpu(), self.config.model.tubelet,
                                self.config.objective.normalize, names)

    def _save(self, done: int) -> None:
        self.engine.save(done, self.config.journal.keep_checkpoints)
        state = self.engine.full_state()
        if self.engine.rank == 0:
            save_model_folder(self.plan.run_folder / "model", self.model, state)

    def _introduce(self, first_step: int) -> None:
        config, plan, say = self.config, self.plan, self.journal.say
        parameters = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in self.model.parameters())
        say(f"run folder {plan.run_folder}: " + (f"resumed after step {first_step}" if first_step else "new"))
        say(f"{len(plan.videos)} videos, {parameters / 1e6:.1f} million parameters, {plan.num_visible} of {config.model.num_tokens} tokens "
            f"visible, {plan.num_masked} predicted")
        say(plan.schedule_line)
        say(f"kernels: {describe(config.engine.kernels, self.engine.device)}; device {self.engine.device}, {config.engine.precision}, "
            f"ZeRO stage {config.engine.zero_stage}")

    def _conclude(self, report: Path) -> None:
        folder = self.plan.run_folder
        for what, where in (("model", folder / "model"), ("curves", folder / "curves.png"), ("pictures", folder / "reconstructions"),
                            ("report", report)):
            self.journal.say(f"{what:9}{where}")


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def _check_run_folder(config: PretrainConfig, folder: Path) -> None:
    """A folder is new, or holds this very run."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: is not empty and not a run folder (no config.yaml); choose another output")
    before, now = flatten(load_config(folder / "config.yaml")), flatten(config)
    for key, value in now.items():
        if value != before[key] and not key.startswith(FREE_KEYS):
            raise ValueError(f"{folder}: this run was started with {key} = {before[key]}, now it is {value}; set it back, or choose "
                             "another output")
