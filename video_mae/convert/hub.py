"""Models by their names: a path, or a repository of the Hugging Face hub. huggingface_hub fetches
it; cache, offline mode and tokens are its business.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten

from video_mae.files import is_regular, one_line

NAME = re.compile(r"(?:hf:(?://)?)?(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")
"""hf://OWNER/NAME@REVISION; hf: alone is an earlier spelling."""
REMEDY = (
    "check name and revision, `hf auth login` or HF_TOKEN for what is private or gated, the "
    "network and HF_HUB_OFFLINE; or name a folder"
)


def located(name: str | Path, key: str = "") -> Path:
    """The file or folder that `name` means: a path; else hf://OWNER/NAME[@REVISION], or OWNER/NAME,
    a repository whose tensors and JSON are fetched from the hub where its cache lacks them.

    key: begins an error. Raises: FileNotFoundError with one line.
    """
    path = Path(re.sub("^hf:(?!//)", "", str(name)))
    if is_regular(path) or path.is_dir():
        return path
    found = NAME.fullmatch(str(name))
    if found is None:
        raise FileNotFoundError(f"{key}{name}: no such file or folder")
    with asking_hub(f"{key}{name}: no such file or folder here, and nothing from the hub"):
        # who names a path does not wait for it
        from huggingface_hub import snapshot_download

        repository, revision = found.groups()
        fetch = partial(snapshot_download, repository, revision=revision, ignore_patterns="*/*")
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            folder = Path(fetch(allow_patterns=["*.json", weights]))
            if any(folder.glob(weights)):
                break
    return folder


@contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Tells what the hub, its cache or the network refuses inside, in one line that begins with
    `what`. Raises: FileNotFoundError.
    """
    try:
        yield
    except Exception as error:  # of a library, and of those below it
        reason = shorten(str(error), 200, break_on_hyphens=False, placeholder=" ...")
        raise FileNotFoundError(one_line(f"{what} ({reason}); {REMEDY}")) from None
