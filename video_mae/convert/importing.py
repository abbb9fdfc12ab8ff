"""A model of another project as one of ours, with an account of every tensor."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from video_mae.config import ClassifierConfig
from video_mae.convert import hugging_face, mae, official
from video_mae.convert.architecture import Draft, Facts
from video_mae.convert.foreign_files import Source, read_source
from video_mae.convert.layout import Found, Layout, find, recognise, their_name
from video_mae.model.vit import VideoClassifier, VideoMAE

VIDEOMAE, VITMAE = hugging_face.videomae("v4"), hugging_face.vit_mae("v4")
PROJECTS: tuple[tuple[Layout, Callable[[Draft], None]], ...] = (
    (official.OFFICIAL, official.describe),
    (official.MMACTION, official.describe),
    (mae.MAE, mae.describe),
    (mae.MAE_ST, mae.describe_st),
    (VIDEOMAE, hugging_face.describe),
    (VITMAE, hugging_face.describe),
)

# Outside of the blocks too, these would change what the model computes.
ESSENTIAL = re.compile(
    r"(cls|class|dist|reg|register|mask)_tokens?$|pos(ition)?_embed|rel(ative)?_pos"
)


@dataclass(frozen=True, kw_only=True)
class Report:
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
        return [
            f"{self.source}: {self.project}, a {self.kind}; {self.used} tensors used, {len(self.left_out)} entries left out",
            *self.remarks(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)


def import_model(
    path: str | Path, facts: Facts | None = None, *, impl: str = "auto"
) -> tuple[VideoMAE | VideoClassifier, Report]:
    """Reads a checkpoint of VideoMAE, VideoMAE V2, Hugging Face VideoMAE or ViTMAE, mmaction2, MAE,
    MAE-pytorch or mae_st.

    path: a file, or a Hugging Face folder; facts: what it may leave open. The model is on the CPU,
    in evaluation mode. An encoder alone becomes a VideoMAE whose decoder is new.
    Raises: FileNotFoundError; ValueError with one line that names the file and what is wrong.
    Executes nothing from the files.
    """
    source = read_source(path)
    where = str(source.path)
    projects = _candidates(source)
    layout = recognise(source.tensors, [layout for layout, _ in projects], where)
    draft = Draft(found=find(source.tensors, layout, where), source=source, facts=facts or Facts())
    _refuse_unknown(draft)
    next(describe for known, describe in projects if known is layout)(draft)
    return _build(draft, impl)


def _candidates(source: Source) -> list[tuple[Layout, Callable[[Draft], None]]]:
    """The projects that may have written a source: config.json names one, where there is one."""
    if "model_type" not in source.config:
        return list(PROJECTS)
    kind = source.config["model_type"]
    if "model_config" in source.config:  # VideoMAE V2 on the hub: the official names
        return [project for project in PROJECTS if project[0] is official.OFFICIAL]
    wanted = {"videomae": VIDEOMAE, "vit_mae": VITMAE}
    if not isinstance(kind, str) or kind not in wanted:
        raise ValueError(
            f"{source.path / 'config.json'}: model_type is {kind!r}; videomae and vit_mae are known here"
        )
    return [project for project in PROJECTS if project[0] is wanted[kind]]


def _refuse_unknown(draft: Draft) -> None:
    """Raises: ValueError for a tensor without which the model would compute something else."""
    layout = draft.found.layout
    blocks = {name.split("*")[0] for rule in layout.rules for name in rule.theirs if "*" in name}
    for name in draft.found.rest:
        spelled = draft.found.spelled[name]
        if name.endswith("attn.scale"):
            raise draft.wrong(
                f"{spelled}: is of cosine attention (cos_attn of VideoMAE V2), which is not supported"
            )
        inside = any(name.startswith(prefix) for prefix in blocks)
        aside = name in layout.positions or (name.startswith("decoder") and not draft.has_decoder)
        if inside or (ESSENTIAL.search(name) and not aside):
            raise draft.wrong(
                f"{spelled}: is a part of a model that is not known here; without it the model would compute something else"
            )


def _build(draft: Draft, impl: str) -> tuple[VideoMAE | VideoClassifier, Report]:
    config, found, head = draft.config(), draft.found, draft.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what is new
        model = (
            VideoClassifier(config, head, impl=impl)
            if isinstance(head, ClassifierConfig)
            else VideoMAE(config, head, impl=impl)
        )
    expected = model.state_dict()
    new: dict[str, str] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in expected.items():
        if name in found.ours:
            if found.ours[name].numel() != tensor.numel():
                raise draft.wrong(
                    f"{_called(name, found)}: has {found.ours[name].numel()} values, where {tensor.numel()} are expected"
                )
            state[name] = found.ours[name].reshape(tensor.shape)
        elif name.startswith("decoder.") and not draft.has_decoder:
            state[name], new["decoder"] = (
                tensor,
                "with random weights: the source is an encoder alone",
            )
        else:
            raise draft.wrong(f"{_called(name, found)} is missing")
    model.load_state_dict(state)
    superfluous = [name for name in found.ours if name not in expected]
    for name in superfluous:
        reason = _why_not(name, model)
        if reason is None:
            raise draft.wrong(
                f"{_called(name, found)} has no place in the {type(model).__name__} that the other tensors make"
            )
        draft.left_out[_called(name, found)] = reason
    for name in found.rest:
        draft.left_out.setdefault(found.spelled[name], "no part of the model has this name")
    return model.eval(), Report(
        source=draft.source.path.name,
        files=draft.source.files,
        project=found.layout.project,
        kind=type(model).__name__,
        used=found.used - len(superfluous),
        left_out={**draft.source.left_out, **draft.left_out},
        new=new,
        notes=tuple(draft.notes),
    )


def _called(ours: str, found: Found) -> str:
    """What the file calls a tensor of ours, as far as that can be said."""
    plain = their_name(ours, found.layout)
    return found.spelled.get(plain, plain)


def _why_not(ours: str, model: VideoMAE | VideoClassifier) -> str | None:
    """Why a tensor that was found has no part in the model; None where it should have one."""
    if isinstance(model, VideoMAE):
        reasons = {
            "fc_norm": "it is the norm before a head, and there is none",
            "head": "this model has a decoder instead",
        }
        return reasons.get(ours.split(".")[0])
    return (
        "this classifier norms the mean of the tokens by fc_norm instead"
        if ours.startswith("encoder.norm.")
        else None
    )
