"""The extraction stage: the features of clips along videos of any length, one file a video, with
the times of the clips.

C clips of a video, B clips of a pass, L chosen blocks, D features.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from video_mae.config.data import SourceConfig
from video_mae.config.evaluation import ExtractConfig
from video_mae.config.schema import flatten, require
from video_mae.convert.model_folder import Model, allow_readers, load_pretrained
from video_mae.data.videos import FEATURES, read_annotations
from video_mae.data.views import Times, VideoStream, Windows
from video_mae.data.workers import plan_workers
from video_mae.decoding import Place, Reading
from video_mae.evaluation.features import FrozenEncoder, clips_of
from video_mae.evaluation.ranks import Ranks, check_start
from video_mae.files import json_text, one_line, say, write_json, write_text, write_whole
from video_mae.processes import hold_folder
from video_mae.results import check_made_with

DONE, NOTHING = 0, 3
INDEX_FILE = "index.jsonl"
FREE_KEYS = (
    "batch_size",
    "num_workers",
    "stride",
    "data.root",
    "data.list_format",
    "data.decoder_threads",
)
# of a video's name that its file keeps; with hash and ending a name has at most 255 bytes
MAX_STEM, MAX_BYTES = 100, 224


def start(model: str, source: str, folder: str, config: ExtractConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the extraction is what is
    returned.
    """
    check_start(config)
    return Extraction(load_pretrained(model), [source], Path(folder), config).run


class Extraction:
    """A checked extraction, which `run` does: files[i] is where the features of paths[i] go."""

    def __init__(
        self, model: Model, sources: Sequence[str], folder: Path, config: ExtractConfig
    ) -> None:
        """Checks model, list, layers and folder before anything is decoded. Raises: ValueError or
        FileNotFoundError with one line.
        """
        self.config, self.folder = config, folder
        self.model = model
        c, data = model.config, config.data
        quarters = [max(c.depth * part // 4 - 1, 0) for part in range(1, 5)]
        self.layers = config.layers or tuple(dict.fromkeys(quarters))
        told, different = list(self.layers), set(self.layers)
        remedy = f"must be blocks of the encoder, 0 to {c.depth - 1}"
        require(different.issubset(range(c.depth)), "layers", told, remedy)
        require(len(different) == len(told), "layers", told, "must differ")
        self.workers = plan_workers(config.num_workers, data.decoder_threads)
        trained = clips_of(model)
        sampling = config.sampling or ("dense" if config.hop else trained.sampling)
        stride = config.stride or data.stride or trained.stride
        self.windows = Windows(
            num_frames=c.num_frames,
            height=c.height,
            width=c.width,
            stride=stride,
            hop=config.hop or c.num_frames * stride,
            crop=config.crop,
            sampling=sampling,
            reading=Reading.of(data, c.in_channels, threads=self.workers.threads),
        )
        # each once, a video, or all of a list or folder; labels do not matter
        paths = dict[str, Place]()
        self.notes = list[str]()
        for source in sources:
            found = SourceConfig(source=source, root=data.root, list_format=data.list_format)
            videos = read_annotations(found, "LIST_OR_VIDEO")
            paths |= {_full(path): path for path in videos.paths}
            self.notes += videos.notes
        self.paths = tuple(paths.values())
        self.files = [folder / file_name(path, config.format) for path in self.paths]
        self.settings = {
            **{key: value for key, value in flatten(config).items() if key not in FREE_KEYS},
            "sampling": sampling,
            "data.stride": stride,
            "hop": self.windows.hop,
            "layers": told,
            "span": self.windows.span,
            "weights": _fingerprint(model),
        }
        check_made_with(folder / FEATURES, self.settings, earlier={"sampling": "dense"})
        if sampling != trained.sampling or (sampling == "dense" and stride != trained.stride):
            self.notes.append(
                f"frames: {sampling}, stride {stride}, as given here; without it "
                f"{trained.sampling}, stride {trained.stride}"
            )

    def run(self) -> int:
        """Extracts what is not there yet; the videos are shared over the ranks. Returns 0; 3 where
        no video could be decoded.
        """
        with Ranks() as ranks, hold_folder(self.folder, ranks.rank) as told:
            if ranks.is_main:
                self.notes += told
                write_json(self.folder / FEATURES, self.settings)
            ranks.gather([])  # the folder is there
            bad = dict(ranks.gather(list(self._extract(ranks).items())))
            return self.conclude(bad) if ranks.is_main else DONE

    def _extract(self, ranks: Ranks) -> dict[int, str]:
        """This rank's share; returns the videos that could not be decoded, with the reasons."""
        config = self.config
        layers = self.layers if config.level == "pyramid" else ()
        encoder = FrozenEncoder(self.model, ranks.device, config.precision, layers)
        mine = [
            video
            for video in ranks.share(len(self.paths))
            if _seconds(self.files[video]) <= _seconds(_full(self.paths[video]))
        ]
        ranks.say(
            *self.notes,
            f"{len(self.paths)} videos, {ranks.size} ranks, {len(mine)} left for the first; a clip "
            f"spans {self.windows.span} frames, one every {self.windows.hop}; device "
            f"{ranks.device}, {config.precision}; {self.workers.describe()}",
            self.workers.told,
        )
        bad, files = dict[int, str](), dict[int, FeatureFile]()
        read = partial(self.windows.pieces, batch_size=config.batch_size)
        stream = VideoStream(self.paths, mine, read)
        with ranks.progress(len(mine)) as progress:
            for video, piece, failure in stream.load(self.workers.num):
                if failure:
                    bad[video] = failure.reason
                    progress.write(one_line(f"{failure.path}: {failure.reason}"))
                    if video in files:
                        files.pop(video).discard()
                    progress.update()
                    continue
                clip_BTHWC, times = piece
                features = self._encode(encoder, clip_BTHWC)
                if times:
                    files[video] = self._new_file(self.files[video], times, features.shape[1:])
                files[video].append(features)
                # by its share, so that the time that is left is known of a long video too
                progress.update(len(features) / files[video].shape[0])
                if files[video].missing == 0:
                    files.pop(video).close()
        assert not files, "a video ended before its last clip"
        return bad

    def _encode(self, encoder: FrozenEncoder, clip_BTHWC: torch.Tensor) -> NDArray[np.float32]:
        """[B, D] pooled, [B, time, row, column, D] tokens, or [B, L, time, row, column, D]."""
        tokens_BND, pooled_BD, pyramid_BLND = encoder(clip_BTHWC)
        if self.config.level == "pooled":
            return pooled_BD.cpu().numpy()
        tokens = tokens_BND if pyramid_BLND is None else pyramid_BLND
        return tokens.unflatten(-2, encoder.config.grid).cpu().numpy()

    def _new_file(self, path: Path, times: Times, shape: tuple[int, ...]) -> "FeatureFile":
        beside = {
            "start_frame": times.start_frame_C,
            "start_seconds": times.start_seconds_C,
            "end_seconds": times.end_seconds_C,
        }
        if times.video_start_seconds:  # the file's own clock does not begin with its first frame
            beside["video_start_seconds"] = np.array(times.video_start_seconds)
        whole = (len(times.start_frame_C), *shape)
        return FeatureFile(path, self.config.format, whole, self.config.dtype, beside)

    def conclude(self, bad: dict[int, str]) -> int:
        """Tells of what is there, and of the bad videos, with the reasons. Returns the status."""
        lines = []
        for video, path in enumerate(self.paths):
            row = {"bad": bad[video]} if video in bad else {"file": self.files[video].name}
            lines.append(json_text({"path": _full(path), **row}) + "\n")
        write_text(self.folder / INDEX_FILE, "".join(lines))
        if bad:
            print(
                f"{len(bad)} of {len(self.paths)} videos could not be decoded; {INDEX_FILE} names "
                "them"
            )
        say(f"features {self.folder}")
        return NOTHING if len(bad) == len(self.paths) else DONE


@dataclass
class FeatureFile:
    """One file with the array `features` [C, ...] and small arrays beside it. `append` clips, then
    `close`; or `discard` it.

    Until then the features lie in a file without a name, which ends with the process. Equal
    features are equal bytes.
    """

    path: Path
    kind: Literal["npz", "safetensors"]
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16"]
    beside: Mapping[str, NDArray[np.generic]]

    def __post_init__(self) -> None:
        self.missing = self.shape[0]
        self._written = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115

    def append(self, features: NDArray[np.floating]) -> None:
        """Adds the features of the next clips."""
        self.missing -= len(features)
        self._written.write(features.astype(self.dtype).tobytes())

    def close(self) -> None:
        """Puts the finished file in its place."""
        self._written.flush()
        # mapped, so that a video may have more features than there is memory
        features = np.memmap(self._written, self.dtype, "r", shape=self.shape)
        # copies: safetensors takes memory as it lies, whatever the strides of an array
        arrays = {name: array.copy() for name, array in self.beside.items()}
        arrays["features"] = features

        def write(unfinished: Path) -> None:
            if self.kind == "npz":
                with unfinished.open("wb") as file:
                    # its members are of 1980: the bytes tell no time
                    np.savez(file, allow_pickle=False, **arrays)
            else:
                save_file(arrays, unfinished)
                allow_readers(unfinished)

        write_whole(self.path, write, features.nbytes)
        self.discard()

    def discard(self) -> None:
        """Removes what was written aside."""
        self._written.close()


def file_name(path: Place, kind: str) -> str:
    """The name of a video's file: its own, and a hash of its full path, so that no two videos share
    one.
    """
    full = _full(path)
    # what is not UTF-8 is left out
    stem = os.fsencode(Path(full).stem[:MAX_STEM])[:MAX_BYTES].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:12]}.{kind}"


def _full(path: Place) -> str:
    """The same for a video wherever the program runs."""
    return str(path) if "://" in str(path) else os.path.abspath(str(path))


def _seconds(file: Path | str) -> float:
    """When a file was written; 0 where it is not there, or is a member of a shard."""
    return os.path.getmtime(file) if os.path.exists(file) else 0


def _fingerprint(model: Model) -> str:
    """A hash of the weights: features of two models never share a folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
