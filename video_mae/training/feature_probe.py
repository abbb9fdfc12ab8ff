"""What is measured of an encoder while it is pretrained: the loss on videos that it does not learn
from, and how much its features know; no weight and no sample of the run depends on it.

B = 1 clip, N patch tokens, M videos, D features, K classes, L losses.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from video_mae.config import PretrainConfig
from video_mae.config.data import SourceConfig
from video_mae.data.dataset import Batch, Failure, MiddleClips, share_batches
from video_mae.data.loader import DevicePrefetcher, make_loader
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList, read_annotations, read_labeled
from video_mae.decoding.choices import dense_indices
from video_mae.model.objective import Losses
from video_mae.training.feature_quality import (
    dead_share,
    effective_rank,
    neighbour_scores,
    ridge_scores,
)
from video_mae.training.journal import Journal

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO has them
InputsOf = Callable[[Batch], tuple[Any, ...]]
"""What the model takes of a batch to give its losses."""


class FeatureProbe:
    """Measures the encoder of a run on the lists of config.probe.

    Each video goes through the model by itself, its middle clip cut in the middle, under a mask
    that its place in the list alone decides: no figure depends on batches, ranks or the run's seed.
    """

    def __init__(self, config: PretrainConfig) -> None:
        """Reads the lists. Raises: ValueError or FileNotFoundError with one line that names the
        list or key, and the remedy.
        """
        probe = config.probe
        self.config, self._not_before, self._is_told = config, 0.0, False
        self.lists = dict[str, VideoList]()
        resumed = config.has_begun
        if probe.train:
            read = partial(
                read_labeled, root=probe.root, list_format=probe.list_format, resumed=resumed
            )
            train = self.lists["train"] = read("probe.train", probe.train)
            read = partial(read, num_classes=train.num_classes, names=train.class_names)
            videos = read("probe.validation", probe.validation)
        else:
            source = SourceConfig(
                source=probe.validation, root=probe.root, list_format=probe.list_format
            )
            videos = read_annotations(source, "probe.validation", resumed=resumed)
        self.lists["validation"] = videos

    def follow(self, done: int, epoch: float, journal: Journal, inputs_of: InputsOf) -> None:
        """Measures the model as it is after step `done` and writes a line, where there is time for
        it or no step comes after; every rank must call it.
        """
        max_share, begin = self.config.probe.max_share, time.perf_counter()
        is_early = journal.engine.gather(begin < self._not_before)[0]  # by the clock of rank 0
        if is_early and done < journal.total_steps:
            if not self._is_told:
                self._is_told = True
                journal.say(
                    f"no probe after step {done}, nor later wherever it would take more than "
                    f"probe.max_share = {max_share} of the time"
                )
            return
        with journal.aside():
            found = {name: self._encode(name, journal, inputs_of) for name in self.lists}
            if journal.engine.rank == 0 and all(found.values()):
                journal.record(done, epoch, self.scores(**found))
        # by then its cost is the share of the time since it began
        self._not_before = begin + (time.perf_counter() - begin) / max_share

    def scores(
        self, validation: Sequence[torch.Tensor], train: Sequence[torch.Tensor] = ()
    ) -> dict[str, float]:
        """The figures, from what `_encode` found in each list."""
        x_MD, label_M, loss_ML = validation
        names = Losses._fields if self.config.objective.contrastive_weight else ("loss",)
        means = loss_ML.double().mean(dim=0).tolist()
        scores = {f"probe_{name}": mean for name, mean in zip(names, means, strict=False)}
        scores["probe_rank"] = float(effective_rank(x_MD))
        scores["probe_dead"] = float(dead_share(x_MD))
        if train:
            examples = train[0], train[1], self.lists["train"].num_classes
            knn_MK = neighbour_scores(x_MD, *examples, [NUM_NEIGHBOURS], TEMPERATURE)[0]
            for name, score_MK in (("knn", knn_MK), ("ridge", ridge_scores(x_MD, *examples))):
                is_right_M = score_MK.argmax(dim=1) == label_M
                scores[f"probe_{name}"] = float(is_right_M.double().mean())
        return scores

    def _encode(self, name: str, journal: Journal, inputs_of: InputsOf) -> list[torch.Tensor]:
        """Of the videos of a list that are used and can be decoded the features [M, D], which are
        the mean of the patch tokens, the labels [M] and of validation videos the losses [M, L],
        from all ranks; nothing where there is none.
        """
        engine, videos, data = journal.engine, self.lists[name], self.config.data
        # where the run has several sources, files are read as those of the first
        source = next(iter(data.by_name.values()))
        model = self.config.model
        choose = partial(dense_indices, num_frames=model.num_frames, stride=source.stride)
        clips = MiddleClips(Sources([("probe", source, videos)]), data, model, choose)
        num = min(self.config.probe.num_videos, len(videos))
        # as many batches on each rank, for ZeRO 3
        order = share_batches(num, 1, engine.rank, engine.world_size)
        order = [[place * len(videos) // num for place in batch] for batch in order]
        rows, failures = list[list[torch.Tensor]](), list[Failure]()
        for batch in DevicePrefetcher(make_loader(clips, order, data), engine.device):
            failures += batch.failures
            tokens_BND = engine.evaluate(batch.clip_BTHWC)[:, model.class_tokens :]
            row = [tokens_BND.float().mean(dim=1), batch.label_B]
            if name == "validation":
                output = engine.evaluate(*inputs_of(batch))
                row.append(torch.stack(output[: len(Losses._fields)])[None])
            # a model that has diverged has no features
            if batch.index_B >= 0 and row[0].isfinite().all():
                rows.append([column.cpu() for column in row])
        for failure in chain(*engine.gather(failures)):
            journal.say(
                f"probe: {failure.path} does not count: {failure.decoder}: {failure.reason}"
            )
        return [torch.cat(column) for column in zip(*chain(*engine.gather(rows)), strict=True)]
