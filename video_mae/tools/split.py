"""The split stage: a list or a folder of classes as lists to train, validate and test on."""

import os
import random
import re
from collections import defaultdict
from pathlib import Path

from video_mae.config.data import SourceConfig
from video_mae.config.schema import require
from video_mae.config.tools import SplitConfig
from video_mae.data.lists import format_line
from video_mae.data.videos import CLASS_FILE, class_file, read_annotations
from video_mae.files import read_text, say, write_text


def start(source: str, config: SplitConfig) -> int:
    """The stage as the command line starts it. A group is in one part; each part has its share of
    the videos, and of those of a label, as far as whole groups allow.

    For that groups come by their size, the larger ones first (those within a power of two count as
    equal), then by label, then in an order that is drawn, and each goes where most is missing.
    Raises: ValueError or FileNotFoundError with one line; then nothing is written.
    """
    require(any(config.shares), "shares", list(config.shares), "must not all be 0")
    videos = read_annotations(SourceConfig(source=source), "LIST_OR_FOLDER")
    for note in videos.notes:
        say(note)
    path, texts = Path(source), videos.paths
    folder = Path(config.output or f"{path.absolute()}_split")
    require(not folder.exists(), "output", folder, "exists; choose another, or remove it")
    if path.is_file():
        texts = re.findall(r".*\S.*", read_text(path))[-len(videos) :]  # without a header
    groups = defaultdict[str, list[int]](list)
    for video, text in enumerate(texts):
        try:
            groups[re.findall(config.group, text)[0]].append(video)  # pyright: ignore
        except re.error as error:
            raise ValueError(f"group: {config.group} is wrong as a pattern: {error}") from None
        except (IndexError, TypeError):  # the last: of a packed folder
            raise ValueError(f"group: {config.group} is not found in {text!s:.100}") from None
    parts, rng, num_seen = ([], [], []), random.Random(config.seed), 0
    order = sorted(
        groups.values(),
        key=lambda group: (-len(group).bit_length(), videos.label_M[group[0]], rng.random()),
    )
    for group in order:
        num_seen += len(group)
        most = max(
            range(3),
            key=lambda part: config.shares[part] * num_seen - sum(config.shares) * len(parts[part]),
        )
        parts[most].extend(group)
    lines = [format_line(os.path.abspath(place), info["label"]) for place, info in videos]
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        write_text(folder / f"{name}.txt", "".join(f"{lines[video]}\n" for video in sorted(part)))
        say(f"{len(part):8} videos  {folder / name}.txt")
    names = videos.class_names or class_file(path)
    if names:
        write_text(folder / CLASS_FILE, "\n".join([*names, ""]))
    return 0
