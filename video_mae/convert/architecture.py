"""From the tensors of a file to a configuration: what they say, what the source says beside them,
what the user says, what is published.

Letters: N tokens of a grid, D width of encoder or decoder, A 1 where a table has a row for the
class token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from video_mae.config import (
    PRESETS,
    ClassifierConfig,
    ModelConfig,
    ObjectiveConfig,
)
from video_mae.config.model import MOST_TOKENS
from video_mae.convert.facts import (
    SOMETHING_CLASSES,
    USUAL_FRAMES,
    USUAL_SIDE,
    USUAL_STRIDE,
    Facts,
    Options,
    Tensors,
)
from video_mae.convert.project import NamedTensors
from video_mae.model.positions import computed_positions

# of VideoMAE; MAE and mae_st have the same
HEADS = {preset["embed_dim"]: preset["num_heads"] for preset in PRESETS.values()}


@dataclass(kw_only=True)
class Draft(NamedTensors):
    """A model as it is being inferred: fields of its configuration so far, and notes of what was
    assumed.
    """

    facts: Facts
    # what the source says beside its tensors, by keys of Facts and some more; None: nothing
    told: Options = field(default_factory=dict)
    fields: Options = field(default_factory=dict)
    head: ObjectiveConfig | ClassifierConfig = field(default_factory=ObjectiveConfig)
    pooling: Literal["mean", "rest"] = "mean"  # where there is a norm after it
    notes: list[str] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens."""
        f = self.fields
        return (
            f["num_frames"] // f["tubelet_size"],
            f["height"] // f["patch_size"],
            f["width"] // f["patch_size"],
        )

    def settle(self, key: str, guess: Any, why: str, *, firm: bool = False) -> Any:
        """The user's value of a key, else the source's, else a guess of which a note is made; `why`
        there is, or is no, guess.
        """
        told, wanted = self.told.get(key), getattr(self.facts, key)
        if wanted not in (None, ()):
            if told not in (None, wanted):
                if firm:
                    raise self.wrong(f"is of {key} = {told}, not {wanted}")
                self.notes.append(f"{key} = {wanted}: given, though the source says {told}")
            return wanted
        if told is not None:
            return told
        if guess is None:
            raise self.wrong(f"does not say {key}, and {why}; give {key}=...")
        self.notes.append(f"{key} = {guess}: not in the source, {why}")
        return guess

    def architecture(self) -> None:
        """Everything that names and shapes alone tell; what a project always has is no matter of
        shapes, so that a tensor that is lost is missed.
        """
        embed = self.tensor("encoder.patch_embed.weight")
        if embed.dim() not in (4, 5) or embed.shape[-1] != embed.shape[-2] or not embed.numel():
            raise self.wrong(
                f"{self.called('encoder.patch_embed.weight')}: has shape {tuple(embed.shape)}, "
                "which is none of square patches"
            )
        self.ours["encoder.patch_embed.weight"] = embed.flatten(1)
        is_video = embed.dim() == 5
        width = len(embed)
        biases = {name[-6] for name in self.ours if name.endswith(("q_bias", "k_bias", "v_bias"))}
        self.fields.update(
            num_frames=USUAL_FRAMES if is_video else 1,  # unless told otherwise
            in_channels=embed.shape[1],
            tubelet_size=embed.shape[2] if is_video else 1,
            patch_size=embed.shape[-1],
            embed_dim=width,
            depth=len(self.blocks("encoder")),
            mlp_ratio=self.length("encoder.blocks.0.mlp.0.weight") / width,
            class_tokens=int(self.has("encoder.class_token")),
            layer_scale=float(any(".gamma_" in name for name in self.ours)),
            qkv_bias="qkv" if "k" in biases else "qv" if biases else "none",
            encoder_norm=self.has_decoder or self.is_classifier or self.has("encoder.norm."),
        )
        if self.has_decoder:
            width = self.length("decoder.encoder_to_decoder.weight")
            has_own = "decoder.class_token" in self.project.outside
            self.fields.update(
                decoder_embed_dim=width,
                decoder_depth=len(self.blocks("decoder")),
                decoder_mlp_ratio=self.length("decoder.blocks.0.mlp.0.weight") / width,
                decoder_embed_bias=self.project.is_mae,
                decoder_class_token="own" if has_own else "encoded",
            )

    def _heads(self, key: str, width: int, published: Mapping[int, int]) -> None:
        guess = published.get(width)
        why = f"{'as the' if guess else 'no'} published one that is {width} wide"
        self.fields[key] = heads = self.settle(key, guess, why)
        if width % heads:
            raise self.wrong(f"{key} = {heads} does not divide a width of {width}; give {key}=...")

    def clip(self, *, times: int | None = None, places: int | None = None) -> None:
        """The clip's size; times, places: tokens of the position tables, a square unless told
        otherwise.
        """
        f, facts, told = self.fields, self.facts, self.told
        if times is not None and told.get("num_frames") is None:
            told["num_frames"] = times * f["tubelet_size"]
        sides = {told.get("height"), told.get("width"), facts.height, facts.width}
        if places is not None and sides == {None}:
            side = math.isqrt(places)
            if side**2 != places:
                raise self.wrong(
                    f"has positions of {places} places, no square; give height=... width=..."
                )
            told["height"] = told["width"] = side * f["patch_size"]
        for key, usual, unit in (
            ("num_frames", f["num_frames"], "tubelet_size"),
            ("height", USUAL_SIDE, "patch_size"),
            ("width", USUAL_SIDE, "patch_size"),
        ):
            f[key] = self.settle(key, usual, "as usual", firm=True)
            if f[key] % f[unit]:
                raise self.wrong(
                    f"{key} = {f[key]} is no multiple of a tubelet's {f[unit]}; give {key}=..."
                )
        if math.prod(self.grid) > MOST_TOKENS:
            raise self.wrong(
                f"{self._clip} has {math.prod(self.grid)} tokens; more than {MOST_TOKENS} are not "
                "believed"
            )
        ours = self.grid[0], self.grid[1] * self.grid[2]
        theirs = times or ours[0], places or ours[1]
        if ours != theirs:
            raise self.wrong(
                f"has positions of {theirs[0]} times and {theirs[1]} places, {self._clip} has "
                f"{ours[0]} and {ours[1]}; give num_frames=... height=... width=..."
            )

    @property
    def _clip(self) -> str:
        f = self.fields
        return f"a clip of {f['num_frames']} x {f['height']} x {f['width']}"

    def positions(self) -> None:
        """Tables of the file are not kept where they are what is computed here, to the project's
        tolerance.

        If one is another, or all are learned, all are kept as parameters. Raises: ValueError.
        """
        f, kind, tolerance = self.fields, self.project.computed, self.project.tolerance
        kept: Tensors = {}
        differences: dict[str, float] = {}  # by names of the file
        for side in self.sides:
            width = f["embed_dim" if side == "encoder" else "decoder_embed_dim"]
            table_ND, class_row_D = computed_positions(kind, self.grid, width), torch.zeros(width)
            name = self.project.positions.get(side, "")
            given = self.table(name)
            if given is not None:
                spelled, rows = self.spelled[name], len(given) - len(table_ND)
                if rows not in (0, f["class_tokens"]) or given.shape[1] != width:
                    raise self.wrong(
                        f"{spelled}: has shape {(1, *given.shape)}, but {self._clip} has "
                        f"{len(table_ND)} positions, {width} wide; "
                        "give num_frames=... height=... width=..."
                    )
                computed = torch.cat([class_row_D.expand(rows, -1), table_ND])
                differences[spelled] = float((given - computed).abs().max())
                table_ND = given[rows:]
                class_row_D = given[0] if rows else class_row_D
                self.unknown.pop(name)
            elif self.project.is_mae:
                raise self.wrong(f"{name} is missing")
            kept[f"{side}.positions.table"] = table_ND
            if f["class_tokens"]:
                kept[f"{side}.positions.class_row"] = class_row_D
        worst = max(differences.values(), default=0.0)
        is_other = tolerance is not None and worst > tolerance
        if is_other:
            self.notes.append(
                f"positions = learned: the tables of the source differ by up to {worst:.1e} from "
                "what is computed here"
            )
        if is_other or tolerance is None:
            f["positions"] = "learned"
            self.ours.update(kept)
            return
        f["positions"] = kind
        for spelled, difference in differences.items():
            equal = f", equal to {difference:.0e}" if difference else ""
            self.source.left_out[spelled] = f"is computed here{equal}"

    def purpose(self) -> None:
        """What no tensor tells: heads; means and deviations of the input, usual ones of RGB where
        the source does not say; then the classifier or the objective.
        """
        self._heads("num_heads", self.fields["embed_dim"], HEADS)
        if self.has_decoder:
            width = self.fields["decoder_embed_dim"]
            self._heads("decoder_num_heads", width, self.project.decoder_heads)
        usual, why = self.project.statistics, "as usual"
        if self.fields["in_channels"] != 3:
            usual, why = ((0.0,), (1.0,)), "for want of others"
        self.fields["mean"] = self.settle("mean", usual[0], why)
        self.fields["std"] = self.settle("std", usual[1], why)
        if self.is_classifier:
            self._classifier()
        else:
            self._objective()

    def _objective(self) -> None:
        """What pretraining minimises. Of an encoder alone it is what it would. Told is whether its
        targets are `normalized`.
        """
        usual = self.project.normalize
        for key in ("sampling", "stride"):
            if getattr(self.facts, key) is not None:
                raise self.wrong(
                    f"has no classes, and {key}=... is how frames of a classifier are chosen"
                )
        context = self.told.get("decoder_context")
        used = self.facts.decoder_context or context or "scored"
        self.fields["decoder_context"] = used
        if used == context == "all":
            self.notes.append(
                "decoder_context = all: as in its training; masks are then those of "
                'token_mask(..., decoder_context="all")'
            )
        normalized = self.told.get("normalized")
        if isinstance(normalized, bool):
            self.told["normalize"] = usual if normalized else "none"
        self.head = ObjectiveConfig(
            normalize=self.settle("normalize", usual, "as published"),
            pixels=self.project.pixels(self.fields["in_channels"]),
        )

    def _classifier(self) -> None:
        """A head on the mean of the tokens where there is fc_norm, on the first token where there
        is not.

        Videos are resized without antialiasing, as the tests of all these projects do it.
        """
        classes = self.length("head.weight")
        guess, why = "dense", "as usual; models of Something-Something have sampling=uniform"
        if classes == SOMETHING_CLASSES:
            guess = "uniform"
            why = (
                f"as Something-Something has {classes} classes; others that many have "
                "sampling=dense"
            )
        is_image = self.fields["num_frames"] == 1
        if is_image:
            self.told["sampling"] = "dense"
        sampling = self.settle("sampling", guess, why)
        if is_image or sampling == "uniform":  # then the stride chooses no frame
            self.told["stride"] = self.told.get("stride") or USUAL_STRIDE
        self.head = ClassifierConfig(
            num_classes=classes,
            class_names=self.told.get("class_names", ()),
            pooling=self.pooling if self.has("fc_norm.") else "first",
            sampling=sampling,
            stride=self.settle("stride", USUAL_STRIDE, "as usual"),
            antialias=self.fields["tubelet_size"] == 1,
        )

    def config(self) -> ModelConfig:
        """Raises: ValueError where the fields do not go together."""
        # a new decoder starts from random weights: the published one of this encoder
        for preset in PRESETS.values():
            if preset["embed_dim"] == self.fields["embed_dim"] and not self.has_decoder:
                new = {key: preset[key] for key in preset if key.startswith("decoder_")}
                self.fields.update(new)
        try:
            config = ModelConfig(**self.fields)
        except ValueError as error:
            raise self.wrong(str(error)) from None
        if self.has_decoder:
            outputs = self.length("decoder.head.weight")
            if outputs != config.predicted_values:
                raise self.wrong(
                    f"its decoder predicts {outputs} values of a tubelet, which has "
                    f"{config.predicted_values}"
                )
        return config


def whole(values: Options, *keys: str) -> int | None:
    """The first positive whole number that a source tells under some keys, or None."""
    for key in keys:
        value = values.get(key)
        if type(value) is int and 1 <= value < 1 << 31:
            return value
    return None


def told_by(options: Options) -> Options:
    """What options of a training tell: heads, the clip's size and stride, and whether targets are
    normalised.
    """
    return {
        "normalized": options.get("normlize_target", options.get("norm_pix_loss")),
        "stride": whole(options, "sampling_rate"),
        "num_heads": whole(options, "num_heads"),
        "decoder_num_heads": whole(options, "decoder_num_heads"),
        "num_frames": whole(options, "num_frames"),
        "height": whole(options, "height", "input_size", "img_size"),
        "width": whole(options, "width", "input_size", "img_size"),
    }
