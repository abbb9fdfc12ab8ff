"""The conversion stage: a model of any project, or of a checkpoint of a run, as one of ours or as
another's.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from video_mae.config import ClipsConfig, FinetuneConfig, JournalConfig, load_config
from video_mae.config.schema import read_keys
from video_mae.convert.export import (
    export_hugging_face,
    export_official,
    export_onnx,
    export_program,
)
from video_mae.convert.facts import ConvertConfig, Facts
from video_mae.convert.foreign_files import read_json
from video_mae.convert.hub import located
from video_mae.convert.importing import import_model
from video_mae.convert.model_folder import (
    Model,
    choose_frames,
    find_model_folder,
    is_model_folder,
    load_pretrained,
    save_model_folder,
)
from video_mae.files import say
from video_mae.model.lora import choose_trained, merged
from video_mae.model.vit import VideoClassifier, VideoMAE
from video_mae.training.checkpoint import MANIFEST, fault, newest, read_manifest
from video_mae.training.engine import Engine
from video_mae.training.fragments import read, whole

REPORT = "import.json"
MODEL_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", REPORT}
EXPORTS = {
    "official": export_official,
    "hugging_face": export_hugging_face,
    "torch_export": export_program,
    "onnx": export_onnx,
}


def start(source: str, destination: str, config: ConvertConfig) -> int:
    """The stage as the command line starts it."""
    for line in convert(source, destination, config):
        say(line)
    say(f"{config.format:14} {destination}")
    return 0


def convert(source: str | Path, destination: str | Path, config: ConvertConfig) -> list[str]:
    """Reads a model and writes it in another format; returns lines on what became of it.

    source: what load_pretrained takes, a run folder, or a checkpoint folder of a run.
    Raises: FileNotFoundError; ValueError with one line. Then nothing is written.
    """
    source, destination = located(source), Path(destination)
    if destination.exists() and not config.overwrite:
        raise ValueError(f"{destination}: exists; name another destination, or say overwrite=true")
    if destination.exists() and source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"{destination}: holds the source; name another destination")
    others = {path.name for path in destination.glob("*")} - MODEL_FILES
    if others:
        raise ValueError(f"{destination}: holds more than a model ({min(others)}); name another")
    model, lines, more = _read(source, config)
    if config.format == "model":
        save_model_folder(destination, model, more=more)
        return lines
    return lines + EXPORTS[config.format](model, destination)


def _read(source: Path, config: ConvertConfig) -> tuple[Model, list[str], dict[str, Any]]:
    """(model, lines about it, what further files of its folder hold)."""
    if not is_model_folder(source):
        model, report = import_model(source, config)
        return model, report.lines(), {REPORT: asdict(report)}
    for f in fields(Facts):
        if f.name not in ("sampling", "stride") and getattr(config, f.name) != f.default:
            raise ValueError(
                f"{f.name}: is for files of other projects; {source} is of this one, and leaves "
                "nothing open"
            )
    more = {}
    checkpoint = _checkpoint_in(source)
    try:
        folder = find_model_folder(source)
    except FileNotFoundError:
        if checkpoint is None:
            raise
        model, lines = _load_checkpoint(checkpoint, config.trust), [f"weights of {checkpoint}"]
    else:
        model, lines = load_pretrained(folder), [f"model of {folder}"]
        if (folder / REPORT).is_file():
            more[REPORT] = read_json(folder / REPORT)
    lines += choose_frames(model, config.sampling, config.stride)
    return model, lines, more


def _checkpoint_in(path: Path) -> Path | None:
    """The checkpoint that is meant: a folder with a manifest, or the newest one of a run folder."""
    if (path / MANIFEST).is_file():
        return path
    found = newest(path / "checkpoints")
    return found[0] if found else None


def _load_checkpoint(folder: Path, trust: bool) -> Model:
    """The model that a checkpoint RUN/checkpoints/step_N holds, in float32: any ZeRO stage, any
    number of ranks. Older ones than the newest have no model folder.

    Raises: FileNotFoundError; ValueError where the checkpoint is not whole, or is one of DeepSpeed,
    by an earlier version, and partitioned over ranks, or `trust` is not given: its state is in
    pickles, and reading one executes whatever it holds.
    """
    reason = fault(folder, slice(None))
    if reason:
        raise ValueError(
            f"{folder}: is no whole checkpoint ({reason}); take another, or the run's model"
        )
    manifest = read_manifest(folder)
    is_of_deepspeed = "memory" not in manifest  # of an earlier version
    if is_of_deepspeed and not trust:
        raise ValueError(
            f"{folder}: holds pickles of DeepSpeed, which can execute code when they are read; "
            "take the run's model folder, or say trust=true if the run is your own"
        )
    if is_of_deepspeed and manifest["world_size"] > 1 and manifest["zero_stage"] > 0:
        raise ValueError(
            f"{folder}: an earlier version wrote it in {manifest['world_size']} ranks; take the "
            "run's model folder, or go on with the run, whose next checkpoint can be read"
        )
    file = folder.resolve().parents[1] / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a checkpoint is read beside the configuration of its run"
        )
    if "classifier" in read_keys(file):
        config = load_config(file, schema=FinetuneConfig)
        model = VideoClassifier(config.model, config.classifier)
        choose_trained(model, config.freeze_blocks, config.lora)
    else:
        config = load_config(file)
        model = VideoMAE(config.model, config.objective)
    if is_of_deepspeed:
        # it is read as a run that goes on does, which changes the model
        engine = Engine(model, replace(config, journal=JournalConfig()))
        engine.load_deepspeed_checkpoint(folder, {})
        state = engine.full_state()
    else:
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        read(folder, whole("weight", state))
    if isinstance(config, FinetuneConfig):
        state = merged(model, state)
        model = VideoClassifier(config.model, config.classifier)
    else:
        model = VideoMAE(config.model, config.objective)
        model.clips_config = ClipsConfig.of(config)
    model.load_state_dict(state)
    return model.eval()
