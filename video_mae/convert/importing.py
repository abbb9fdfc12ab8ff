"""A model of another project as one of ours, with an account of every tensor."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from video_mae.config import ObjectiveConfig
from video_mae.convert import hugging_face, official
from video_mae.convert.architecture import Draft, told_by
from video_mae.convert.facts import Facts
from video_mae.convert.foreign_files import ForeignModel, read_source
from video_mae.convert.model_folder import fitted
from video_mae.convert.project import Project, recognise
from video_mae.model.vit import VideoClassifier, VideoMAE

# What describes a file, by the names of its tensors.
PROJECTS: dict[Project, Callable[[Draft], None]] = {
    official.OFFICIAL: official.describe_videomae,
    official.MMACTION: official.describe_videomae,
    official.MAE: official.describe_mae,
    official.MAE_ST: official.describe_mae_st,
    hugging_face.VIDEOMAE: hugging_face.describe,
    hugging_face.VITMAE: hugging_face.describe,
}
MODEL_TYPES = {"videomae": hugging_face.VIDEOMAE, "vit_mae": hugging_face.VITMAE}

# Outside of the blocks too, these would change what the model computes.
ESSENTIAL = re.compile(
    r"(cls|class|dist|reg|register|mask)_tokens?$|pos(ition)?_embed|rel(ative)?_pos"
)


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What became of a source: tensors used; left out, by name and reason; made anew; and what was
    assumed.
    """

    source: str
    files: tuple[str, ...]
    project: str
    kind: str
    used: int
    left_out: dict[str, str]
    new: dict[str, str]
    notes: tuple[str, ...]

    def remarks(self) -> list[str]:
        """The lines that a person should read."""
        return [
            *self.notes,
            *(f"{name}: left out, {reason}" for name, reason in self.left_out.items()),
            *(f"{name}: new, {reason}" for name, reason in self.new.items()),
        ]

    def lines(self) -> list[str]:
        """All of it."""
        summary = (
            f"{self.source}: {self.project}, a {self.kind}; {self.used} tensors used, "
            f"{len(self.left_out)} entries left out"
        )
        return [summary, *self.remarks()]


def import_model(
    path: str | Path, facts: Facts | None = None, *, impl: str = "auto"
) -> tuple[VideoMAE | VideoClassifier, ImportReport]:
    """Reads a checkpoint of VideoMAE, VideoMAE V2, Hugging Face VideoMAE or ViTMAE, mmaction2, MAE,
    MAE-pytorch or mae_st.

    path: a file, or a Hugging Face folder; facts: what it may leave open. The model is on the CPU,
    in evaluation mode. An encoder alone becomes a VideoMAE whose decoder is new.
    Raises: FileNotFoundError; ValueError with one line that names the file and what is wrong.
    Executes nothing from the files.
    """
    source = read_source(path)
    project = recognise(source.tensors, _candidates(source), str(source.path))
    told = told_by(source.arguments)
    draft = Draft(source=source, project=project, facts=facts or Facts(), told=told)
    _refuse_unknown(draft)
    draft.architecture()
    PROJECTS[project](draft)
    draft.purpose()
    return _build(draft, impl)


def _candidates(source: ForeignModel) -> list[Project]:
    """The projects that a source may have: config.json names one, where there is one."""
    if "model_type" not in source.config:
        return list(PROJECTS)
    if "model_config" in source.config:  # VideoMAE V2 on the hub: the official names
        return [official.OFFICIAL]
    kind = source.config["model_type"]
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(
            f"{source.path / 'config.json'}: model_type is {kind!r}; videomae and vit_mae are "
            "known here"
        )
    return [MODEL_TYPES[kind]]


def _refuse_unknown(draft: Draft) -> None:
    """Raises: ValueError for a tensor without which the model would compute something else."""
    tables = draft.project.positions.values()
    blocks = tuple(f"{prefix}." for prefix in draft.project.blocks.values())
    for name in draft.unknown:
        spelled = draft.spelled[name]
        if name.endswith("attn.scale"):
            raise draft.wrong(
                f"{spelled}: is of cosine attention (cos_attn of VideoMAE V2), which is not "
                "supported"
            )
        aside = name in tables or (name.startswith("decoder") and not draft.has_decoder)
        if name.startswith(blocks) or (ESSENTIAL.search(name) and not aside):
            raise draft.wrong(
                f"{spelled}: is a part of a model that is not known here; without it the model "
                "would compute something else"
            )


def _build(draft: Draft, impl: str) -> tuple[VideoMAE | VideoClassifier, ImportReport]:
    config, head, source = draft.config(), draft.head, draft.source
    left_out = source.left_out
    # Layers that files have beside what a model computes with.
    superfluous = {}
    if isinstance(head, ObjectiveConfig):
        superfluous["fc_norm"] = "it is the norm before a head, and there is none"
        superfluous["head"] = "this model has a decoder instead"
    elif head.pooling != "first":
        superfluous["encoder.norm"] = (
            "this classifier norms the mean of the tokens by fc_norm instead"
        )
    for name in list(draft.ours):
        reason = superfluous.get(name.rpartition(".")[0])
        if reason:
            left_out[draft.called(name)] = reason
            draft.ours.pop(name)
    for name in draft.unknown:
        left_out.setdefault(draft.spelled[name], "no part of the model has this name")
    new = {}
    if isinstance(head, ObjectiveConfig) and not draft.has_decoder:
        new["decoder"] = "with random weights: the source is an encoder alone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what is new
        try:
            model = fitted(config, head, draft.ours, impl, called=draft.called, new=tuple(new))
        except ValueError as error:
            raise draft.wrong(str(error)) from None
    return model, ImportReport(
        source=source.path.name,
        files=source.files,
        project=draft.project.name,
        kind=type(model).__name__,
        used=len(source.tensors.keys() - left_out.keys()),
        left_out=left_out,
        new=new,
        notes=tuple(draft.notes),
    )
