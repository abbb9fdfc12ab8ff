"""The extraction stage: the features of clips along videos of any length, one file a video, with
the times of the clips.

C clips of a video, B clips of a pass, L chosen blocks, D features.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from video_mae.config.data import ListFormat, SourceConfig
from video_mae.config.evaluation import ExtractConfig
from video_mae.config.schema import flatten, require
from video_mae.config.world import World
from video_mae.convert.model_folder import Model, find_model_folder, load_pretrained
from video_mae.data.annotations import read_annotations
from video_mae.data.windows import Piece, PieceStream, Windows, make_piece_loader
from video_mae.data.workers import Workers, plan_workers
from video_mae.decoding import Place, Reading
from video_mae.evaluation.feature_file import FeatureFile
from video_mae.evaluation.features import FrozenEncoder, check_precision
from video_mae.evaluation.ranks import Ranks
from video_mae.files import as_read_back, json_text, write_text
from video_mae.model.vit import VideoClassifier

DONE, NOTHING = 0, 3
SETTINGS_FILE, INDEX_FILE = "extract.json", "index.jsonl"
FREE_KEYS = (
    "batch_size",
    "num_workers",
    "stride",
    "data.root",
    "data.list_format",
    "data.decoder_threads",
)
# of a video's name that its file keeps; with hash, ending and .part a name has at most 255 bytes
MAX_STEM, MAX_BYTES = 100, 224


@dataclass(frozen=True)
class Plan:
    """A checked extraction: files[i] is where the features of paths[i] go. notes: what is to be
    told about the list.
    """

    config: ExtractConfig
    model: Model
    windows: Windows
    workers: Workers
    layers: tuple[int, ...]
    paths: tuple[Place, ...]
    files: tuple[Path, ...]
    folder: Path
    settings: dict[str, Any]
    notes: tuple[str, ...]


def start(model: str, source: str, folder: str, config: ExtractConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the extraction is what is
    returned.
    """
    plan = prepare(model, source, folder, config)
    return lambda: run(plan)


def prepare(model: str, source: str, folder: str, config: ExtractConfig) -> Plan:
    """Checks model, list, layers and folder before anything is decoded. Raises: ValueError or
    FileNotFoundError with one line.
    """
    World.from_environment()
    check_precision(config.precision)
    encoder = load_pretrained(find_model_folder(model))
    c = encoder.config
    layers = config.layers or tuple(
        dict.fromkeys(max(c.depth * part // 4 - 1, 0) for part in range(1, 5))
    )
    for layer in layers:
        require(
            0 <= layer < c.depth,
            "layers",
            list(layers),
            f"must be blocks of the encoder, 0 to {c.depth - 1}",
        )
    require(len(set(layers)) == len(layers), "layers", list(layers), "must differ")
    workers = plan_workers(config.num_workers, config.data.decoder_threads)
    stride = config.stride or config.data.stride
    windows = Windows(
        num_frames=c.num_frames,
        height=c.height,
        width=c.width,
        stride=stride,
        hop=config.hop or c.num_frames * stride,
        crop=config.crop,
        sampling=config.sampling,
        reading=Reading.of(config.data, c.in_channels, threads=workers.threads),
    )
    notes: list[str] = []
    paths = _paths(source, config.data.root, config.data.list_format, notes.append)
    target = Path(folder)
    files = tuple(target / file_name(path, config.format) for path in paths)
    knobs = {key: value for key, value in flatten(config).items() if key not in FREE_KEYS}
    settings = {
        **knobs,
        "data.stride": stride,
        "hop": windows.hop,
        "layers": list(layers),
        "span": windows.span,
        "weights": _fingerprint(encoder),
    }
    _check_folder(target, settings)
    if unlike := _unlike_training(encoder, windows):
        notes.append(unlike)
    return Plan(
        config, encoder, windows, workers, layers, paths, files, target, settings, tuple(notes)
    )


def file_name(path: Place, kind: str) -> str:
    """The name of a video's file: its own, and a hash of its full path, so that no two videos share
    one.
    """
    full = _full(path)
    # what is not UTF-8 is left out
    stem = os.fsencode(Path(full).stem[:MAX_STEM])[:MAX_BYTES].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:12]}.{kind}"


def run(plan: Plan) -> int:
    """Extracts what is not there yet; the videos are shared over the ranks. Returns 0; 3 where no
    video could be decoded.
    """
    ranks = Ranks()
    try:
        if ranks.is_main:
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_text(plan.folder / SETTINGS_FILE, json_text(plan.settings, indent=2) + "\n")
        ranks.gather([])  # the folder is there
        bad = ranks.gather(list(_extract(plan, ranks).items()))
        return _conclude(plan, dict(bad)) if ranks.is_main else DONE
    finally:
        ranks.leave()


def _extract(plan: Plan, ranks: Ranks) -> dict[int, str]:
    """This rank's share; returns the videos that could not be decoded, with the reasons."""
    config, encoder = plan.config, FrozenEncoder(plan.model, ranks.device, plan.config.precision)
    mine = [video for video in ranks.share(len(plan.paths)) if not plan.files[video].exists()]
    if ranks.is_main:
        for note in plan.notes:
            print(note, flush=True)
        print(
            f"{len(plan.paths)} videos, {ranks.size} ranks, {len(mine)} left for the first; a clip spans {plan.windows.span} frames, one "
            f"every {plan.windows.hop}; device {ranks.device}, {config.precision}; {plan.workers.describe()}",
            flush=True,
        )
        if plan.workers.told:
            print(plan.workers.told, flush=True)
    bad: dict[int, str] = {}
    files: dict[int, FeatureFile] = {}
    loader = make_piece_loader(
        PieceStream(plan.paths, mine, plan.windows, config.batch_size), plan.workers.num
    )
    with tqdm(total=len(mine), unit="video", disable=None if ranks.is_main else True) as progress:
        for piece in loader:
            if piece.clip_BTHWC is None:
                bad[piece.video] = piece.failure.reason
                if piece.video in files:
                    files.pop(piece.video).discard()
                progress.update()
                continue
            features = _encode(plan, encoder, piece.clip_BTHWC)
            if piece.times is not None:
                files[piece.video] = _new_file(plan, piece, features.shape[1:])
            files[piece.video].append(features)
            if files[piece.video].missing == 0:
                files.pop(piece.video).close()
                progress.update()
    assert not files, "a video ended before its last clip"
    return bad


def _unlike_training(model: Model, windows: Windows) -> str:
    """A line where a classifier would choose frames in another way; "" where not, or where the
    model does not say.
    """
    if not isinstance(model, VideoClassifier):
        return ""
    head = model.classifier_config
    is_dense = windows.sampling == "dense"
    if is_dense == (head.sampling == "dense") and (not is_dense or windows.stride == head.stride):
        return ""
    return f"frames: {windows.sampling}, stride {windows.stride}, as given here; the model says {head.sampling}, stride {head.stride}"


def _encode(plan: Plan, encoder: FrozenEncoder, clip_BTHWC: torch.Tensor) -> NDArray[np.float32]:
    """[B, D] pooled, [B, time, row, column, D] tokens, or [B, L, time, row, column, D]."""
    grid = encoder.config.grid
    if plan.config.level == "pyramid":
        return encoder.pyramid(clip_BTHWC, plan.layers).unflatten(2, grid).cpu().numpy()
    features = encoder(clip_BTHWC)
    return (
        (
            features.pooled_BD
            if plan.config.level == "pooled"
            else features.tokens_BND.unflatten(1, grid)
        )
        .cpu()
        .numpy()
    )


def _new_file(plan: Plan, piece: Piece, shape: tuple[int, ...]) -> FeatureFile:
    times, config = piece.times, plan.config
    assert times is not None
    beside = {
        "start_frame": times.start_frame_C,
        "start_seconds": times.start_seconds_C,
        "end_seconds": times.end_seconds_C,
    }
    if times.video_start_seconds:  # where the file's own clock does not begin with its first frame
        beside["video_start_seconds"] = np.array(times.video_start_seconds)
    return FeatureFile(
        plan.files[piece.video],
        config.format,
        (len(times.start_frame_C), *shape),
        config.dtype,
        beside,
    )


def _conclude(plan: Plan, bad: dict[int, str]) -> int:
    rows = [
        {
            "path": _full(path),
            **({"bad": bad[video]} if video in bad else {"file": plan.files[video].name}),
        }
        for video, path in enumerate(plan.paths)
    ]
    write_text(plan.folder / INDEX_FILE, "".join(json_text(row) + "\n" for row in rows))
    if bad:
        print(
            f"{len(bad)} of {len(plan.paths)} videos could not be decoded; {INDEX_FILE} names them"
        )
    print(f"features {plan.folder}", flush=True)
    return NOTHING if len(bad) == len(plan.paths) else DONE


def _full(path: Place) -> str:
    """The same for a video wherever the program runs."""
    return str(path) if "://" in str(path) else os.path.abspath(str(path))


def _paths(
    source: str, root: str, list_format: ListFormat = "auto", tell: Callable[[str], object] = print
) -> tuple[Place, ...]:
    """One video, or all of a list or folder, each once; labels do not matter. What is to be said
    about the source is told.
    """
    try:
        videos = read_annotations(SourceConfig(source=source, root=root, list_format=list_format))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("data.source", "LIST_OR_VIDEO")) from None
    for note in videos.notes:
        tell(note)
    return tuple({_full(path): path for path in videos.places}.values())


def _fingerprint(model: Model) -> str:
    """A hash of the weights: features of two models never share a folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """A folder is new, or holds features that were made in this very way."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        if folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
        ):
            raise ValueError(
                f"{folder}: is not empty and holds no features (no {SETTINGS_FILE}); choose another folder"
            )
        return
    try:
        before = {"sampling": "dense", **json.loads(file.read_bytes())}
        changes = [
            f"{key} = {before.get(key)}, now {value}"
            for key, value in as_read_back(settings).items()
            if before.get(key) != value
        ]
    except (ValueError, TypeError):
        raise ValueError(f"{file}: is not readable; choose another folder") from None
    if changes:
        raise ValueError(
            f"{folder}: its features were made with {changes[0]}; choose another folder"
        )
