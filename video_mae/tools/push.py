"""The push stage: a model on the Hugging Face hub, with a card that says what it is."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from video_mae.config.schema import require, to_dict
from video_mae.config.tools import PushConfig
from video_mae.config.yaml_text import to_yaml
from video_mae.convert.export import export_hugging_face
from video_mae.convert.foreign_files import read_json
from video_mae.convert.hub import asking_hub
from video_mae.convert.model_folder import (
    find_model_folder,
    load_pretrained,
    save_model_folder,
)
from video_mae.files import JsonObject, read_jsonl, say, write_text
from video_mae.model.vit import VideoMAE
from video_mae.results import METRICS_FILE

THEIRS = "transformers"
"""The folder of a repository that transformers opens; ours is the repository itself."""
TOLD = re.compile("step|epoch|loss|reconstruction|val_|probe_|top|mean_class|videos")
"""How the names of figures begin that say something of a model."""


def start(model: str, repository: str, config: PushConfig) -> int:
    """The stage as the command line starts it. Raises: FileNotFoundError, also where the hub
    refuses; ValueError.
    """
    # who does not push does not wait for it
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.utils import validate_repo_id

    require("/" in repository, "OWNER/NAME", repository, "does not say whose it is to be")
    validate_repo_id(repository)
    source = find_model_folder(model)
    loaded = load_pretrained(source)
    with TemporaryDirectory() as work:
        folder = Path(config.output or f"{work}/model")
        require(not folder.exists(), "output", folder, "exists; choose another")
        save_model_folder(folder, loaded)
        try:
            export_hugging_face(loaded, folder / THEIRS)
            (name,) = read_json(folder / THEIRS / "config.json")["architectures"]
            theirs = f"{name}.from_pretrained({repository!r}, subfolder={THEIRS!r})"
        except ValueError as error:
            theirs = f"It has no such model ({error})."
        tag = "feature-extraction" if isinstance(loaded, VideoMAE) else "video-classification"
        card = f"""---
library_name: video-mae
pipeline_tag: {tag}
{to_yaml({"license": config.licence})}---

# {repository}

A {type(loaded).__name__} of video-mae: masked autoencoders on video, and what is fine-tuned from
them. It takes clips of uint8 pixels [batch, frames, height, width, channels] as they are decoded,
of the size below; normalisation is inside.

* Trained on: {config.data or "not said"}
* Licence of the weights: {config.licence}

## Figures

```yaml
{to_yaml(_figures(source) or {"figures": "none are known"})}```

## How to load it

```python
from video_mae import load_pretrained

model = load_pretrained("hf://{repository}@{config.revision}")
```

`video-mae predict hf://{repository}@{config.revision} VIDEO` names what is in a video, where it
is a VideoClassifier; `checkpoint=hf://{repository}@{config.revision}` starts a training from it.

With transformers, whose form of it lies in the folder `{THEIRS}`:

    {theirs}

## Architecture

```yaml
{to_yaml(to_dict(loaded.config))}```
"""
        write_text(folder / "README.md", card)
        if config.output:
            say(f"written {folder}, nothing was sent")
            return 0
        with asking_hub(f"{repository}: was not sent"):
            create_repo(repository, private=config.private, exist_ok=True)
            commit = upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=config.revision,
                delete_patterns=f"{THEIRS}/*",  # what an earlier model had there
            )
    say(f"pushed {commit.commit_url}")
    return 0


def _figures(source: Path) -> JsonObject:
    """What is known of a model of a run: the last that metrics.jsonl says (of best/ at its best
    validation), and metrics.json, where it is about this model.
    """
    found, file = {}, source.parent / METRICS_FILE
    entries = read_jsonl(file.with_suffix(".jsonl"))
    if source.name == "best":
        # as best/ is chosen: of those with one accuracy the one with less loss
        entries.sort(key=lambda one: (-(one.get("val_top1") or 0), one.get("val_loss") or 0))
        entries = entries[:1]
    # the folder may have been moved since
    if file.is_file() and Path(read_json(file)["settings"]["model"]).name == source.name:
        entries.append(read_json(file))
    for entry in entries:
        found |= {key: entry[key] for key in entry if TOLD.match(key)}
    return found
