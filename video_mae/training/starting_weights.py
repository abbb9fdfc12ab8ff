"""What a run starts from: the weights of another model, as far as they fit, and an account of every
tensor.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from video_mae.config import FinetuneConfig, ModelConfig, PretrainConfig, RunConfig
from video_mae.convert.export import is_interpolated
from video_mae.convert.model_folder import Model, find_model_folder, load_pretrained
from video_mae.model.inflation import resized
from video_mae.model.vit import VideoClassifier, VideoMAE
from video_mae.training.run_folder import Config, run_in, set_aside

# Fields in which the encoder of a run may differ from the one that it starts from.
FREE_FIELDS = (
    "num_frames",
    "height",
    "width",
    "drop_path",
    "resize_positions",
    "position_grid",
    "predicted_frames",
    "target_width",
)
# Of what follows the encoder's blocks, which a classifier has otherwise.
LAST_FIELDS = ("encoder_norm", "head_norm_eps")


class StartingWeights(NamedTuple):
    """Tensors by their names in the model of a run, and the lines that account for them.

    Where the run goes on from a checkpoint of its own, which holds all, they are none.
    """

    tensors: dict[str, torch.Tensor]
    lines: list[str]


def starting_weights(config: Config) -> tuple[Config, StartingWeights]:
    """What the model that config.checkpoint names gives to a run, and the configuration that knows
    its positions.

    Taken is each tensor that both models have in the same shape: of a decoder only where it
    computes alike, of a head only where it tells the same. A model of another size is interpolated
    as `resized` does.
    Raises: FileNotFoundError; ValueError where the encoders differ, with the overrides that would
    make them agree.
    """
    config = set_aside(config)
    if not config.checkpoint:
        return config, StartingWeights({}, ["starts from random weights"])
    before = run_in(config)
    if before is not None and config.has_begun:
        model = replace(config.model, position_grid=before.model.position_grid)
        line = f"started from {config.checkpoint}, which is not read again"
        return replace(config, model=model), StartingWeights({}, [line])
    place = find_model_folder(config.checkpoint, "checkpoint: ")
    source = load_pretrained(place)
    _require_same_encoder(place, source, config)
    model = config.model
    if source.config.grid != model.grid:
        frames, height, width = model.num_frames, model.height, model.width
        source = resized(source, num_frames=frames, height=height, width=width)  # pyright: ignore
    model = replace(model, position_grid=source.config.position_grid)
    config = replace(config, model=model)
    with torch.device("meta"):
        if isinstance(config, FinetuneConfig):
            expected = VideoClassifier(model, config.classifier)
        else:
            assert isinstance(config, PretrainConfig)
            expected = VideoMAE(model, config.objective)
    ours, theirs = expected.state_dict(), source.state_dict()
    part, why = _unlike_part(source, expected)
    new: dict[str, str] = {}
    for name, tensor in ours.items():
        if name not in theirs:
            new[name] = "not in it"
        elif name.startswith(part):
            new[name] = why
        elif theirs[name].shape != tensor.shape:
            new[name] = f"{list(theirs[name].shape)} there, {list(tensor.shape)} here"
    taken = {name: theirs[name] for name in ours if name not in new}
    left = {name: new.get(name, "not in this model") for name in theirs if name not in taken}
    lines = [
        f"starts from {place}: {len(taken)} of its {len(theirs)} tensors; new: "
        f"{_told(new, taken)}; left over: {_told(left, taken)}"
    ]
    if is_interpolated(model):
        lines.append(
            f"positions are interpolated from the grid {model.position_grid}, which transformers "
            "has no place for, and VideoMAE's own code in classifiers alone: to export the model "
            "to them, train with model.resize_positions=compute"
        )
    return config, StartingWeights(taken, lines)


def _require_same_encoder(place: Path, source: Model, config: RunConfig) -> None:
    free = FREE_FIELDS
    if not (isinstance(config, PretrainConfig) and isinstance(source, VideoMAE)):
        free += LAST_FIELDS
    remedies = [
        remedy
        for name, remedy in _differences(source.config, config.model).items()
        if name not in free and not name.startswith("decoder_")
    ]
    if remedies:
        raise ValueError(
            f"checkpoint: {place} has another architecture than model of this run; "
            f"{' '.join(remedies)} would be the same"
        )


def _unlike_part(source: Model, expected: Model) -> tuple[str | tuple[()], str]:
    """(beginning of names, why) of tensors that mean something else, whatever their shapes; of
    none: ().
    """
    if isinstance(source, VideoClassifier) and isinstance(expected, VideoClassifier):
        ours, theirs = expected.classifier_config, source.classifier_config
        is_named = ours.class_names and theirs.class_names
        if ours.num_classes != theirs.num_classes or (
            is_named and ours.class_names != theirs.class_names
        ):
            return "head.", f"its {theirs.num_classes} classes are others"
    differences = _differences(source.config, expected.config)
    differences.pop("decoder_context", None)  # changes what is computed, not what it means
    decoder = [differences[name] for name in differences if name.startswith("decoder_")]
    if decoder:
        return "decoder.", f"that has {' '.join(decoder)}"
    if "target_width" in differences:
        return "decoder.head.", "it predicts something else"
    return (), ""


def _differences(theirs: ModelConfig, ours: ModelConfig) -> dict[str, str]:
    """{field: the override that would have it as theirs} of fields that are not."""
    found = {}
    for field in fields(ModelConfig):  # pyright: ignore[reportArgumentType]
        value = getattr(theirs, field.name)
        if value != getattr(ours, field.name):
            shown = list(value) if isinstance(value, tuple) else value
            found[field.name] = f"model.{field.name}={shown}"
    return found


def _told(reasons: Mapping[str, str], taken: Mapping[str, object]) -> str:
    """The parts of a model that tensors belong to, with their number and a reason."""
    split = {name.split(".")[0] for name in taken}
    parts: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        top, part = name.split(".")[:2]
        parts.setdefault(f"{top}.{part}" if top in split else top, []).append(reason)
    told = [f"{part} ({len(of)}: {of[0]})" for part, of in parts.items()]
    return ", ".join(told) or "nothing"
