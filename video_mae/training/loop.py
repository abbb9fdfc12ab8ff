"""What the training stages share: the checks before a run, and the loop with its checkpoints, stop
reasons and journal.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from video_mae.config import RunConfig
from video_mae.config.schema import save_config
from video_mae.convert.model_folder import Model, save_model_folder
from video_mae.data.dataset import Batch, ClipDataset
from video_mae.data.loader import DevicePrefetcher, make_loader
from video_mae.data.sampling import StepSampler, sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList
from video_mae.data.workers import Costs, advise, plan_workers
from video_mae.decoding import Member, decoder_version, is_video
from video_mae.files import json_text, read_jsonl, write_text
from video_mae.kernels.dispatch import describe
from video_mae.training.engine import (
    Engine,
    check_resumable,
    deepspeed_config,
    leave,
    world_from_environment,
)
from video_mae.training.journal import Journal
from video_mae.training.optim import Schedule, make_schedule, videos_of_epoch
from video_mae.training.report import write_report
from video_mae.training.reports import Report
from video_mae.training.run_folder import ListFacts, check_lists, settled, write_lists

DONE, STOPPED_BY_POLICY = 0, 3
FIRST_VERDICT = 100  # videos tried before the share of bad ones can stop a run


@dataclass(frozen=True)
class Run:
    """A checked run: its folder, its videos, its learning rates, DeepSpeed's dictionary.
    data.decoder names a decoder, not auto.

    lists: facts of each list by its key; notes: what is to be told about them.
    """

    config: RunConfig
    folder: Path
    videos: VideoList | Sources
    schedule: Schedule
    schedule_line: str
    deepspeed: dict[str, Any]
    lists: dict[str, ListFacts]
    notes: tuple[str, ...]


class Stage(ABC):
    """What a training stage adds to the loop. `memory` is saved with each checkpoint and given back
    when the run goes on.
    """

    augments_in_workers = False
    """Whether workers do more to the pixels of a clip than to crop it."""

    def __init__(
        self, run: Run, engine: Engine, journal: Journal, model: Model, memory: dict[str, Any]
    ) -> None:
        self.run, self.engine, self.journal, self.model, self.memory = (
            run,
            engine,
            journal,
            model,
            memory,
        )
        optim = run.config.optim
        self.videos_per_step = optim.micro_batch * optim.accumulation * engine.world_size
        self.videos_per_epoch = videos_of_epoch(optim, len(run.videos), engine.world_size)

    @abstractmethod
    def dataset(self) -> ClipDataset:
        """Samples by (epoch, index)."""

    @abstractmethod
    def introduce(self) -> str:
        """One line about model and data for the log."""

    @abstractmethod
    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        """`loss`, which is minimised, and what else is measured on micro-batch `micro` of a step;
        the batch is on the device.
        """

    @abstractmethod
    def after(self, done: int, *, ending: bool) -> None:
        """What follows the step that makes `done`; `ending` where none comes after it for now.
        Every rank calls it.
        """

    def results(self) -> list[tuple[str, Path]]:
        """What a finished run leaves besides model, curves and report."""
        return []

    def epoch(self, done: int) -> float:
        """Passes over the list after `done` steps."""
        return done * self.videos_per_step / self.videos_per_epoch

    def save_model(self, name: str) -> None:
        """Writes the model folder RUN/name; every rank must call it."""
        state = self.engine.full_state()
        if self.engine.rank == 0:
            save_model_folder(self.run.folder / name, self.model, state)


MakeStage = Callable[[Run, Engine, Journal, Any, dict[str, Any]], Stage]


def check_run(
    config: RunConfig,
    videos: Callable[[], VideoList | Sources],
    others: Mapping[str, VideoList] | None = None,
) -> Run:
    """Checks what all training stages have in common, without starting anything; `videos` reads the
    list when its turn comes.

    others: further lists that the run depends on, by their keys.
    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    _, world_size = world_from_environment()
    folder = Path(config.output)
    if config.engine.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("engine.precision: fp16 needs a GPU; use bf16 or fp32")
    try:
        describe(
            config.engine.kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
    except ValueError as error:
        raise ValueError(f"engine.kernels: {error}") from None
    config = settled(config, folder)
    check_resumable(folder, config.engine, world_size)
    paths = videos()
    sources = paths.by_key if isinstance(paths, Sources) else {"data.source": paths}
    every = {**sources, **(others or {})}
    lists = {key: ListFacts(videos.digest(), len(videos)) for key, videos in every.items()}
    changed = check_lists(folder, lists, allow_changed=config.data.allow_changed_list)
    notes = [note for videos in every.values() for note in videos.notes]
    clips = config.data.clips_per_video
    schedule, line = make_schedule(config.optim, len(paths), world_size, clips)
    deepspeed = deepspeed_config(
        config.engine,
        config.optim,
        config.journal,
        clips_per_video=clips,
        world_size=world_size,
        run_folder=folder,
    )
    return Run(
        config, folder, paths, schedule, line, deepspeed, lists, (*notes, *filter(None, [changed]))
    )


def run_and_leave(train: Callable[[], int]) -> Callable[[], int]:
    """The training as the command line calls it: at its end the process leaves its group."""

    def run() -> int:
        status = train()
        leave()
        return status

    return run


def train(run: Run, model: Model, macs_per_clip: float, make_stage: MakeStage) -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status.

    0 done; 3 stopped because too many videos or steps were bad; 128 + number stopped by a signal,
    with a checkpoint. macs_per_clip: multiply-accumulates of a forward pass, of which a training
    step costs three.
    """
    config, folder = run.config, run.folder
    engine = Engine(model, config.engine, config.optim, run.deepspeed, folder)
    engine.reports.listen()
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        write_text(folder / "deepspeed.json", json_text(run.deepspeed, indent=2) + "\n")
        write_lists(folder, run.lists)
    first_step, memory = engine.resume()
    decoder = f"{config.data.decoder} {decoder_version(config.data.decoder)}"
    # earlier versions wrote none
    earlier, memory["decoder"] = memory.get("decoder", decoder), decoder
    clips = (
        config.optim.micro_batch
        * config.data.clips_per_video
        * config.optim.accumulation
        * engine.world_size
    )
    journal = Journal(
        folder,
        is_main=engine.rank == 0,
        total_steps=run.schedule.total_steps,
        log_interval=config.journal.log_interval,
        clips_per_step=clips,
        flops_per_clip=6 * macs_per_clip,
        num_devices=engine.world_size,
        device=engine.device,
        precision=config.engine.precision,
        write_events=engine.write_events,
        reduce_mean=engine.mean,
        resumed_step=first_step,
        stages=Costs._fields,
    )
    if earlier != decoder:
        journal.say(
            f"videos are read by {decoder}, up to step {first_step} they were by {earlier}: pixels may differ"
        )
    try:
        return _Loop(run, engine, journal, make_stage(run, engine, journal, model, memory)).train(
            first_step
        )
    finally:
        journal.close()


def is_due(done: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps (0: never) follows step number `done`."""
    return interval > 0 and done % interval == 0


class _Loop:
    """Step after step."""

    def __init__(self, run: Run, engine: Engine, journal: Journal, stage: Stage) -> None:
        self.plan, self.config, self.engine, self.journal, self.stage = (
            run,
            run.config,
            engine,
            journal,
            stage,
        )
        self.skipped, self.skipped_in_a_row, self.signal, self.has_told_fallbacks = (
            engine.deepspeed.skipped_steps,
            0,
            0,
            False,
        )
        self.dataset = stage.dataset()
        self.workers = plan_workers(run.config.data.num_workers, run.config.data.decoder_threads)
        place = self.dataset.paths[0][0]
        packed = ("video" if is_video(place) else "frames") if isinstance(place, Member) else ""
        journal.advise = partial(
            advise,
            data=run.config.data,
            workers=self.workers,
            world_size=engine.world_size,
            packed=packed,
            augments_in_workers=stage.augments_in_workers,
        )

    def train(self, first_step: int) -> int:
        """Steps from first_step on; returns the exit status."""
        self._introduce(first_step)
        batches = DevicePrefetcher(
            self._loader(first_step, self.plan.schedule.total_steps), self.engine.device
        )
        try:
            return self._steps(batches, first_step)
        finally:
            batches.close()

    def _steps(self, batches: Iterator[Batch], first_step: int) -> int:
        config, engine, journal, total = (
            self.config,
            self.engine,
            self.journal,
            self.plan.schedule.total_steps,
        )
        for step in range(first_step, total):
            # stateless as the rest: a resumed run drops the same paths
            torch.manual_seed(sample_seed(config.seed, step, engine.rank, 0))
            values = self._accumulate(batches, step)
            lr = self.plan.schedule.lr(step)
            result = engine.step(lr)
            done = step + 1
            journal.step(
                done, self.stage.epoch(done), values, lr, result.grad_norm, result.skipped_steps
            )
            # A line has waited for the device, a checkpoint will: to know all costs nothing then.
            # Else the host is a step behind.
            of_all = (
                done == total
                or is_due(done, config.journal.log_interval)
                or is_due(done, config.journal.checkpoint_interval)
            )
            self._take_in(engine.reports.take(of_all=of_all))
            if self.signal:
                self._take_in(engine.reports.take(of_all=True))
            reason = self._reason_to_stop(done)
            if reason:
                journal.say(f"stopped at step {done}: {reason}")
                return STOPPED_BY_POLICY
            ending = done == total or self.signal != 0
            if ending or is_due(done, config.journal.log_interval):
                self._tell_fallbacks(ending=ending)
            self.stage.after(done, ending=ending)
            if ending or is_due(done, config.journal.checkpoint_interval):
                engine.save(done, config.journal.keep_checkpoints, self.stage.memory)
                self.stage.save_model("model")
            if self.signal and done < total:
                journal.say(
                    f"stopped by signal {self.signal} after step {done}; start the same command again to go on"
                )
                return 128 + self.signal
        if engine.rank == 0:
            self._conclude(write_report(self.plan.folder, journal.say))
        return DONE

    def _take_in(self, reports: Iterable[Report]) -> None:
        for report in reports:
            self.signal = report.signal
            self.skipped_in_a_row = (
                self.skipped_in_a_row + 1 if report.skipped_steps > self.skipped else 0
            )
            self.skipped = report.skipped_steps
            if self.skipped_in_a_row:
                self.journal.say(
                    f"step {report.step}: skipped, a loss or gradient was not finite ({self.skipped_in_a_row} in a row)"
                )

    def _accumulate(self, batches: Iterator[Batch], step: int) -> dict[str, torch.Tensor]:
        """Forward and backward of one step's micro-batches; returns the means of what the stage
        measures.
        """
        means: dict[str, torch.Tensor] = {}
        num = self.config.optim.accumulation
        for micro in range(num):
            with self.journal.data_wait():
                batch = next(batches)
            self.journal.spent(batch.costs)
            self.journal.quarantine.add(batch.failures)
            self.journal.fallbacks.add(batch.fallbacks)
            values = self.stage.losses(batch, step, micro)
            self.engine.backward(values["loss"], last=micro == num - 1)
            for name, value in values.items():
                means[name] = value.detach() / num + means.get(name, 0.0)
        return means

    def _loader(self, first_step: int, last_step: int) -> Any:
        optim, dataset = self.config.optim, self.dataset
        sampler = StepSampler(
            len(dataset),
            optim.micro_batch,
            optim.accumulation,
            self.engine.rank,
            self.engine.world_size,
            self.config.seed,
            first_step,
            last_step,
            dataset.paths.stream(self.config.seed),
            self.stage.videos_per_epoch,
        )
        return make_loader(
            dataset,
            sampler,
            self.config.data,
            say=self.journal.say if self.engine.rank == 0 else print,
        )

    def _reason_to_stop(self, done: int) -> str:
        if self.skipped_in_a_row >= self.config.engine.max_skipped_in_a_row:
            return (
                f"{self.skipped_in_a_row} steps in a row were not finite; the last checkpoint is from before them: lower "
                "optim.base_lr, set optim.clip_grad or use another engine.precision"
            )
        if done % self.config.journal.log_interval and done != self.plan.schedule.total_steps:
            return ""
        videos = len(self.plan.videos)
        bad = self.engine.gather(len(self.journal.quarantine))[0]
        tried = min(done * self.stage.videos_per_step + bad, videos)
        if bad <= self.config.data.max_bad_share * tried or tried < min(FIRST_VERDICT, videos):
            return ""
        return (
            f"{bad} of about {tried} videos tried could not be decoded, more than data.max_bad_share = "
            f"{self.config.data.max_bad_share}; they are named in {self.plan.folder / 'quarantine.jsonl'}"
        )

    def _tell_fallbacks(self, *, ending: bool) -> None:
        """Once as soon as there are some, and at the end."""
        if (
            self.engine.rank != 0
            or (self.has_told_fallbacks and not ending)
            or not len(self.journal.fallbacks)
        ):
            return
        self.has_told_fallbacks = True
        first, num = read_jsonl(self.journal.fallbacks.file)[0], len(self.journal.fallbacks)
        self.journal.say(
            f"{num} of the videos so far were read by another decoder, the first {first['path']} by {first['decoder']}, as "
            f"{first['reason'].split(';')[0]}; {self.journal.fallbacks.file} names them, `video-mae pack` cures them"
        )

    def _introduce(self, first_step: int) -> None:
        config, run, say = self.config, self.plan, self.journal.say
        parameters = sum(
            math.prod(getattr(p, "ds_shape", p.shape)) for p in self.stage.model.parameters()
        )
        say(
            f"run folder {run.folder}: "
            + (f"resumed after step {first_step}" if first_step else "new")
        )
        say(
            f"{len(run.videos)} videos, {parameters / 1e6:.1f} million parameters, {self.stage.introduce()}"
        )
        for note in run.notes:
            say(note)
        say(run.schedule_line)
        say(
            f"kernels: {describe(config.engine.kernels, self.engine.device)}; device {self.engine.device}, {config.engine.precision}, "
            f"ZeRO stage {config.engine.zero_stage}"
        )
        say(f"videos are read by {self.stage.memory['decoder']}; {self.workers.describe()}")
        if self.workers.told:
            say(self.workers.told)

    def _conclude(self, report: Path) -> None:
        folder = self.plan.folder
        for what, where in (
            ("model", folder / "model"),
            *self.stage.results(),
            ("curves", folder / "curves.png"),
            ("report", report),
        ):
            self.journal.say(f"{what:9}{where}")
