"""The loop of training that all stages share: checks, steps, lines, checkpoints, reasons to end."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch.utils.data import Dataset

from video_mae.config.schema import save_config
from video_mae.config.world import World
from video_mae.convert.model_folder import Model
from video_mae.data.dataset import Batch, Sample, UndecodableError
from video_mae.data.loader import DevicePrefetcher, make_loader
from video_mae.data.sampling import StepSampler, sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList
from video_mae.data.workers import Costs, advise, plan_workers
from video_mae.decoding import Member, decoder_version, is_video
from video_mae.files import storing, write_json
from video_mae.kernels.dispatch import describe
from video_mae.processes import hold_folder
from video_mae.training.dry_run import dry_run
from video_mae.training.engine import Engine, check_start, leave
from video_mae.training.heartbeat import heartbeat
from video_mae.training.journal import Journal
from video_mae.training.moving_average import WeightAverage
from video_mae.training.optim import make_schedule, videos_of_epoch
from video_mae.training.run_folder import (
    LISTS_FILE,
    Config,
    check_lists,
    check_rates,
    check_shared,
    settled,
)
from video_mae.training.run_page import RunPage, num_parameters
from video_mae.training.saving import publish, roll_back, save_run, weights
from video_mae.training.starting_weights import StartingWeights

DONE, STOPPED_BY_POLICY = 0, 3
FIRST_VERDICT = 100  # videos tried before the share of bad ones can stop a run


class Training(ABC, Generic[Config]):
    """A run of a training stage. To make one checks all that can be wrong and starts nothing; `run`
    trains. A stage says what is learned, from which clips, and what follows a step.

    config: as it holds for the whole run, data.decoder names a decoder. memory: what a stage
    remembers; it is saved with each checkpoint and given back when the run goes on.
    """

    model: Model
    engine: Engine
    journal: Journal
    memory: dict[str, Any]
    average: WeightAverage | None

    def __init__(
        self,
        config: Config,
        videos: Sources,
        weights: StartingWeights,
        validation: VideoList | None = None,
    ) -> None:
        """Raises: ValueError or FileNotFoundError, one line with the file or key and the remedy."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            describe(config.engine.kernels, torch.device(device))
        except ValueError as error:
            raise ValueError(f"engine.kernels: {error}") from None
        self.config, before, turns = settled(config)
        config = self.config
        self.folder, self.videos, self.validation = Path(config.output), videos, validation
        self.weights = weights
        check_start(config)
        lists = dict(videos.by_key)
        if validation is not None:
            lists["validation.source"] = validation
        self.lists = {
            key: {"digest": one.digest(), "videos": len(one)} for key, one in lists.items()
        }
        changed = check_lists(config, self.lists)
        notes = [note for one in lists.values() for note in one.notes]
        optim = config.optim
        world_size = World.from_environment().size
        counts = len(videos), world_size, config.data.clips_per_video
        self.schedule, line = make_schedule(optim, *counts)
        check_rates(self.folder, make_schedule(before, *counts)[0], self.schedule)
        self.introduction = [*notes, *changed, *weights.lines, *turns, line]
        if config.engine.zero_stage == 2 and optim.accumulation > 1:
            self.introduction.append(
                f"ZeRO 2 reduces gradients with each of the {optim.accumulation} micro-batches of "
                "a step; engine.zero_stage=1 does so once, and keeps them all until then"
            )
        self.videos_per_step = optim.micro_batch * optim.accumulation * world_size
        self.videos_per_epoch = videos_of_epoch(optim, len(videos), world_size)

    @abstractmethod
    def make_model(self) -> tuple[Model, float]:
        """The model, and the multiply-accumulates of its forward pass for a clip."""

    @abstractmethod
    def make_dataset(self) -> Dataset[Sample]:
        """Samples by the keys of `arranged`."""

    def arranged(self, sampler: StepSampler) -> Iterable[list[Any]]:
        """The keys of the samples of each micro-batch: (epoch, index)."""
        return sampler

    def augments_in_workers(self) -> bool:
        """Whether workers do more to the pixels of a clip than to crop it."""
        return False

    @abstractmethod
    def introduce(self) -> str:
        """A line about model and data."""

    @abstractmethod
    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        """`loss`, which is minimised, and more of micro-batch `micro`; it is on the device."""

    def begin(self) -> None:
        """Once: the engine has the weights that a new run starts from, not yet a checkpoint's."""
        decay = self.config.optim.ema
        self.average = WeightAverage(self.engine, decay) if decay > 0 else None

    def measure(self, done: int) -> dict[str, float]:
        """What a line about the step that made `done` holds besides, the same on every rank."""
        return {}

    @abstractmethod
    def after(self, done: int) -> None:
        """What follows the step that makes `done`. Every rank calls it."""

    def start(self) -> int | Callable[[], int]:
        """What the command line runs: `command`, unless this is a dry run."""
        return dry_run(self) if self.config.dry_run else self.command

    def command(self) -> int:
        """`run` alone in its folder; ranks leave together. Raises: FolderError, StorageError."""
        rank, stall_seconds = World.from_environment().rank, self.config.engine.stall_seconds
        with hold_folder(self.folder, rank) as told, heartbeat(self.folder, stall_seconds):
            self.introduction += told
            try:
                exit_status = self.run()
                # a launcher ends the rest as soon as one is gone
                self.engine.gather(exit_status)
            except UndecodableError as error:
                exit_status = STOPPED_BY_POLICY
                self.journal.say(f"stopped: {error}", anywhere=True)
        leave()
        return exit_status

    def run(self) -> int:
        """Trains from the newest checkpoint of the run folder to the last step. Returns the exit
        status: 0 done; 3 stopped because too many videos or steps were bad; 75 gone back to the
        last checkpoint for such a step; 128 + number stopped by a signal, with a checkpoint.
        """
        torch.manual_seed(self.config.seed)
        self.model, macs_per_clip = self.make_model()
        self.model.load_state_dict(self.weights.tensors, strict=False)
        self.engine = engine = Engine(self.model, self.config)
        engine.statuses.listen()
        self.begin()
        first_step, self.memory = engine.resume(self.tensors())
        self.skipped, self.skipped_in_a_row = int(engine.skipped_steps), 0
        self.signal, self.is_save_due = 0, False
        engine.together(partial(self._open, first_step, macs_per_clip))
        engine.together(partial(check_shared, self.folder))
        if first_step:  # the start that wrote the checkpoint may have been killed before its model
            publish(self, weights(self))
        with closing(self.journal):
            with closing(engine.writer), closing(self._batches(first_step)) as batches:
                done = first_step
                while not self.reason_to_end(done):
                    exit_status = self._step(batches, done)
                    if exit_status is not None:
                        return exit_status
                    done += 1
            if engine.rank == 0:
                self.page.finish(self.reason_to_end(done))
        return DONE

    def _open(self, first_step: int, macs_per_clip: float) -> None:
        """Writes what a run folder holds from the start. Raises: StorageError."""
        config, engine = self.config, self.engine
        with storing(self.folder):
            if engine.rank == 0:
                for checkpoint, fault in engine.faults.items():
                    checkpoint.rename(checkpoint.with_name(f".damaged_{checkpoint.name}"))
                    self.introduction.append(f"passed over: {checkpoint.name}: {fault}")
                save_config(config, self.folder / "config.yaml")
                write_json(self.folder / "deepspeed.json", engine.dictionary)
                write_json(self.folder / LISTS_FILE, self.lists)
            self.journal = Journal(
                engine,
                total_steps=self.schedule.total_steps,
                clips_per_step=self.videos_per_step * config.data.clips_per_video,
                flops_per_clip=6 * macs_per_clip,  # a training step costs three forward passes
                resumed_step=first_step,
                stages=Costs._fields,
                sums=self.memory.get("sums", ()),
            )
            if engine.rank == 0:
                self.page = RunPage(self, first_step)

    def _step(self, batches: Iterator[Batch], step: int) -> int | None:
        """One step of the optimizer and what follows it; the exit status where it is the last."""
        config, engine, journal = self.config, self.engine, self.journal
        # stateless as the rest: a resumed run drops the same paths
        torch.manual_seed(sample_seed(config.seed, step, engine.rank, 0))
        values = self._accumulate(batches, step)
        lr = self.schedule.lr(step)
        grad_norm = engine.step(lr)
        if self.average:
            self.average.update(step)
        done = step + 1
        is_last = done == self.schedule.total_steps
        is_logged = is_last or is_due(done, config.journal.log_interval)
        more = self.measure(done) if is_logged else {}
        journal.step(done, self.epoch(done), values, lr, grad_norm, engine.skipped_steps, more)

        is_saved = is_last or is_due(done, config.journal.checkpoint_interval) or self.is_save_due
        # a line and a checkpoint wait for the device anyhow; else the host is a step behind
        self._learn_of_steps(of_all=is_logged or is_saved)
        if self.signal:
            self._learn_of_steps(of_all=True)
        reason = self.reason_to_stop(done, is_logged)
        if reason:
            journal.say(f"stopped at step {done}: {reason}")
            return os.EX_TEMPFAIL if roll_back(self, done) else STOPPED_BY_POLICY

        self.after(done)
        is_last = self.reason_to_end(done) != ""
        ending = is_last or self.signal != 0
        if ending or is_logged:
            journal.tell_fallbacks(ending)
        if is_logged and not ending and engine.rank == 0:
            self.page.update()
        is_saved = is_saved or ending
        journal.say(engine.writer.settle(wait=is_saved))
        if is_saved:
            self.is_save_due = not save_run(self, done)
        if self.signal and not is_last:
            journal.say(
                f"stopped by signal {self.signal} after step {done}; start the same command again "
                "to go on"
            )
            return 128 + self.signal
        return STOPPED_BY_POLICY if is_last and self.is_save_due else None

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
            self.journal.quarantine.add(batch.failures, step + 1)
            self.journal.fallbacks.add(batch.fallbacks, step + 1)
            values = self.losses(batch, step, micro)
            self.engine.backward(values["loss"], last=micro == num - 1)
            for name, value in values.items():
                means[name] = value.detach() / num + means.get(name, 0.0)
        return means

    def _learn_of_steps(self, *, of_all: bool) -> None:
        """Takes in what is known by now of the steps before: a signal, and which were skipped."""
        for status in self.engine.statuses.take(of_all=of_all):
            self.signal = status.signal
            is_skipped = status.skipped_steps > self.skipped
            self.skipped = status.skipped_steps
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
            if is_skipped:
                self.journal.say(
                    f"step {status.step}: skipped, a loss or gradient was {self.engine.unusual} "
                    f"({self.skipped_in_a_row} in a row)"
                )

    def reason_to_stop(self, done: int, is_logged: bool) -> str:
        config = self.config
        most = config.engine.max_skipped_in_a_row
        if config.engine.on_spike in ("stop", "rollback"):
            most = 1
        if self.skipped_in_a_row >= most:
            return (
                f"{self.skipped_in_a_row} steps in a row were {self.engine.unusual}; the last "
                "checkpoint is from before them: lower optim.base_lr, set optim.clip_grad or use "
                "another engine.precision"
            )
        if not is_logged:
            return ""
        num_videos = len(self.videos)
        bad = self.engine.gather(len(self.journal.quarantine))[0]
        tried = min(self.videos_before(done) + bad, num_videos)
        most = config.data.max_bad_share
        if bad <= most * tried or tried < min(FIRST_VERDICT, num_videos):
            return ""
        return (
            f"{bad} of about {tried} videos tried could not be decoded, more than "
            f"data.max_bad_share = {most}; they are named in {self.journal.quarantine.file}"
        )

    def reason_to_end(self, done: int) -> str:
        """Why a run is finished after `done` steps, the same on every rank; "" where it goes on."""
        return f"all of its {done} steps are done" if done == self.schedule.total_steps else ""

    def _batches(self, first_step: int) -> DevicePrefetcher:
        """Introduces the run, and starts what loads its batches."""
        config, engine, journal = self.config, self.engine, self.journal
        workers = plan_workers(config.data.num_workers, config.data.decoder_threads)
        self._introduce(first_step, workers.describe())
        journal.say(workers.told)
        packed, place = "", self.videos[0][0]
        if isinstance(place, Member):
            packed = "video" if is_video(place) else "frames"
        journal.advise = partial(
            advise,
            data=config.data,
            workers=workers,
            world_size=engine.world_size,
            packed=packed,
            augments_in_workers=self.augments_in_workers(),
        )
        sampler = StepSampler(
            len(self.videos),
            config.optim.micro_batch,
            config.optim.accumulation,
            engine.rank,
            engine.world_size,
            config.seed,
            first_step,
            self.schedule.total_steps,
            self.videos.stream(config.seed),
            self.videos_per_epoch,
        )
        loader = make_loader(self.make_dataset(), self.arranged(sampler), config.data)
        if engine.rank == 0:
            loader.say = journal.say
        return DevicePrefetcher(loader, engine.device)

    def _introduce(self, first_step: int, loading: str) -> None:
        config, engine, say = self.config, self.engine, self.journal.say
        decoder = f"{config.data.decoder} {decoder_version(config.data.decoder)}"
        earlier = self.memory.get("decoder", decoder)  # earlier versions wrote none
        self.memory["decoder"] = decoder
        if earlier != decoder:
            say(
                f"videos are read by {decoder}, up to step {first_step} they were by {earlier}: "
                "pixels may differ"
            )
        millions = num_parameters(self.model) / 1e6
        state = f"resumed after step {first_step}" if first_step else "begins with the first step"
        if reason := self.reason_to_end(first_step):
            state = f"already finished, {reason}"
        say(f"run folder {self.folder}: {state}")
        say(f"{len(self.videos)} videos, {millions:.1f} million parameters, {self.introduce()}")
        for line in self.introduction:
            say(line)
        say(
            f"kernels: {describe(config.engine.kernels, engine.device)}; device {engine.device}, "
            f"{config.engine.precision}, ZeRO stage {config.engine.zero_stage}"
        )
        say(f"videos are read by {decoder}; {loading}")

    def is_measured(self, done: int, interval: int) -> bool:
        """Whether the model is measured after step `done`; after the last one it always is."""
        is_now = self.num_measures(done, interval) > self.num_measures(done - 1, interval)
        return is_now or done == self.schedule.total_steps

    def num_measures(self, done: int, interval: int) -> int:
        """How often one that is measured every `interval` steps was; 0: with every epoch's end."""
        epochs = self.videos_before(done) // self.videos_per_epoch
        return done // interval if interval else min(done, epochs)

    def videos_before(self, step: int) -> int:
        """How many videos the steps before one take."""
        return step * self.videos_per_step

    def epoch(self, done: int) -> float:
        """Passes over the list after `done` steps."""
        return self.videos_before(done) / self.videos_per_epoch

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a run remembers beside what the engine does, the same on every rank."""
        return {}


def is_due(done: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps (0: never) follows step `done`."""
    return interval > 0 and done % interval == 0
