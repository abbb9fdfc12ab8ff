"""The conversion stage: a model of any project as one of ours, or ours as another's."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

from video_mae.config.schema import knob
from video_mae.convert.architecture import Facts
from video_mae.convert.export import export_hugging_face, export_official, export_program
from video_mae.convert.hugging_face import Version
from video_mae.convert.importing import import_model
from video_mae.convert.model_folder import (
    Model,
    choose_frames,
    find_model_folder,
    is_model_folder,
    load_pretrained,
    save_model_folder,
)
from video_mae.convert.run_checkpoint import checkpoint_folder, load_checkpoint
from video_mae.files import json_text

REPORT = "import.json"


class ConvertConfig(Facts):
    """`video-mae convert SOURCE DESTINATION key=value ...`."""

    format: Literal["model", "official", "hugging_face", "torch_export"] = knob(
        "model",
        "what to write: a model folder of this project, a file for the code of VideoMAE, a folder for transformers, a program of "
        "torch.export (.pt2, classifiers)",
    )
    layout: Version = knob(
        "v4",
        "hugging_face: the version of transformers whose names are used; version 5 reads v4 too",
    )
    overwrite: bool = knob(False, "replace what is at DESTINATION")
    trust: bool = knob(
        False,
        "read the pickles of a checkpoint folder of DeepSpeed, which can execute code: only for runs of your own",
    )


def start(source: str, destination: str, config: ConvertConfig) -> int:
    """The stage as the command line starts it."""
    for line in convert(source, destination, config):
        print(line)
    print(f"{config.format:9}{destination}")
    return 0


def convert(source: str | Path, destination: str | Path, config: ConvertConfig) -> list[str]:
    """Reads a model and writes it in another format; returns lines on what became of it.

    source: what load_pretrained takes, a run folder, or with `trust` a checkpoint folder of a run.
    Raises: FileNotFoundError; ValueError with one line. Then nothing is written.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and not config.overwrite:
        raise ValueError(f"{destination}: exists; name another destination, or say overwrite=true")
    if destination.exists() and destination.resolve() in (
        source.resolve(),
        *source.resolve().parents,
    ):
        raise ValueError(f"{destination}: holds the source; name another destination")
    model, lines, more = _read(source, config)
    if config.format == "model":
        save_model_folder(destination, model, more=more)
    elif config.format == "official":
        lines += export_official(model, destination)
    elif config.format == "hugging_face":
        lines += export_hugging_face(model, destination, config.layout)
    else:
        lines += export_program(model, destination)
    return lines


def _read(source: Path, config: ConvertConfig) -> tuple[Model, list[str], dict[str, str]]:
    """(model, lines about it, further files of a model folder)."""
    if not source.is_file() and not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    facts = Facts(**{f.name: getattr(config, f.name) for f in fields(Facts)})
    if not is_model_folder(source):
        model, report = import_model(source, facts)
        return model, report.lines(), {REPORT: json_text(report.to_dict(), indent=2) + "\n"}
    others = replace(facts, sampling=None, stride=None)
    if others != Facts():
        changed = next(
            f.name for f in fields(Facts) if getattr(others, f.name) != getattr(Facts(), f.name)
        )
        raise ValueError(
            f"{changed}: is for files of other projects; {source} is of this one, and leaves nothing open"
        )
    checkpoint = checkpoint_folder(source)
    try:
        folder = find_model_folder(source)
    except FileNotFoundError:
        if checkpoint is None:
            raise
        model, lines, report = (
            load_checkpoint(checkpoint, trust=config.trust),
            [f"weights of {checkpoint}"],
            None,
        )
    else:
        model, lines, report = load_pretrained(folder), [f"model of {folder}"], folder / REPORT
    lines += choose_frames(model, facts.sampling, facts.stride)
    return (
        model,
        lines,
        {REPORT: report.read_text(encoding="utf-8")}
        if report is not None and report.is_file()
        else {},
    )
