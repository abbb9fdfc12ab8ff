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
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    ClassifierConfig,
    ModelConfig,
    ObjectiveConfig,
)
from video_mae.config.schema import Knobs, knob, require
from video_mae.convert.foreign_files import Source
from video_mae.convert.layout import Found, readable
from video_mae.model.positions import computed_positions

# of VideoMAE; MAE and mae_st have the same
HEADS = {preset["embed_dim"]: preset["num_heads"] for preset in PRESETS.values()}
USUAL_FRAMES, USUAL_SIDE, USUAL_STRIDE = 16, 224, 4
# of Something-Something, V1 and V2, whose models take one frame of each part of a video
SOMETHING_CLASSES = 174
# of a clip that a file may name: its positions are computed, whatever their number
MAX_TOKENS = 1 << 20


class Facts(Knobs):
    """What a source may leave open. A clip size that it tells must agree; heads, statistics and
    normalisation given here win.
    """

    num_heads: int | None = knob(
        None,
        "attention heads of the encoder; null: as the source says, or as published for its width",
        low=1,
    )
    decoder_num_heads: int | None = knob(None, "attention heads of the decoder, likewise", low=1)
    num_frames: int | None = knob(
        None,
        f"frames of a clip; null: as the source says, or {USUAL_FRAMES} (1 for an image model)",
        low=1,
    )
    height: int | None = knob(None, f"pixels; null: as the source says, or {USUAL_SIDE}", low=1)
    width: int | None = knob(None, "pixels, likewise", low=1)
    sampling: Literal["dense", "uniform"] | None = knob(
        None,
        "how a classifier's frames are chosen (classifier.sampling); null: as the "
        "source says, or uniform for the 174 classes of Something-Something, else dense",
    )
    stride: int | None = knob(
        None,
        f"video frames from one frame of a dense clip to the next; null: as the source says, or {USUAL_STRIDE}",
        low=1,
    )
    mean: tuple[float, ...] = knob(
        (),
        "channel means of the input in [0, 1]; empty: as the source says, or as its project has them",
    )
    std: tuple[float, ...] = knob((), "channel standard deviations, likewise")
    normalize: Literal["channel", "tubelet", "none"] | None = knob(
        None,
        "what normalised the targets of pretraining; null: as the source says, or as published",
    )
    decoder_context: Literal["scored", "all"] | None = knob(
        None,
        "what the decoder sees in dual masking (model.decoder_context); null: as "
        "the source says, or scored",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.mean) == len(self.std),
            "std",
            self.std,
            f"must have as many values as mean = {self.mean}",
        )


@dataclass(kw_only=True)
class Draft:
    """A model as it is being inferred: fields of its configuration so far, and notes of what was
    assumed.
    """

    found: Found
    source: Source
    facts: Facts
    fields: dict[str, Any] = field(default_factory=dict)
    head: ObjectiveConfig | ClassifierConfig = field(default_factory=ObjectiveConfig)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # name in the file -> why

    @property
    def has_decoder(self) -> bool:
        return self.found.has("decoder.blocks.")

    @property
    def is_classifier(self) -> bool:
        return self.found.has("head.") and not self.has_decoder

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens."""
        f = self.fields
        return (
            f["num_frames"] // f["tubelet_size"],
            f["height"] // f["patch_size"],
            f["width"] // f["patch_size"],
        )

    def wrong(self, text: str) -> ValueError:
        """The error that names the source."""
        return ValueError(f"{self.source.path}: {text}")

    def settle(self, key: str, told: Any, guess: Any, why: str, *, firm: bool = False) -> Any:
        """The user's value of a key, else the source's, else a guess of which a note is made; `why`
        there is, or is no, guess.
        """
        wanted = getattr(self.facts, key)
        if wanted in (None, ()):
            if told is None and guess is None:
                raise self.wrong(f"does not say {key}, and {why}; give {key}=...")
            if told is None:
                self.notes.append(f"{key} = {guess}: not in the source, {why}")
            return guess if told is None else told
        if told is not None and told != wanted:
            if firm:
                raise self.wrong(f"is of {key} = {told}, not {wanted}")
            self.notes.append(f"{key} = {wanted}: given, though the source says {told}")
        return wanted

    def shapes(
        self,
        *,
        decoder_embed_bias: bool,
        decoder_class_token: Literal["encoded", "own"] = "encoded",
    ) -> None:
        """Everything that names and shapes alone tell; given is what a project always has, so that
        a tensor that is lost is missed.
        """
        sizes, found = self.found.sizes, self.found
        for part, name in (
            ("encoder.patch_embed.weight", "patch embedding"),
            ("encoder.blocks.", "block of an encoder"),
            ("encoder.blocks.0.mlp.0.weight", "MLP in its blocks"),
        ):
            if not found.has(part):
                raise self.wrong(f"has no {name}")
        biases = {name[-6] for name in found.ours if name.endswith(("q_bias", "k_bias", "v_bias"))}
        self.fields.update(
            in_channels=sizes["C"],
            tubelet_size=sizes.get("t", 1),
            patch_size=sizes["p"],
            embed_dim=sizes["D"],
            depth=found.depth("encoder.blocks"),
            mlp_ratio=sizes["H"] / sizes["D"],
            class_tokens=int(found.has("encoder.class_token")),
            layer_scale=float(any(".gamma_" in name for name in found.ours)),
            qkv_bias="qkv" if "k" in biases else "qv" if biases else "none",
            encoder_norm=self.has_decoder or self.is_classifier or found.has("encoder.norm."),
        )
        if self.has_decoder:
            if not found.has("decoder.blocks.0.mlp.0.weight"):
                raise self.wrong("has no MLP in the blocks of its decoder")
            self.fields.update(
                decoder_embed_dim=sizes["E"],
                decoder_depth=found.depth("decoder.blocks"),
                decoder_mlp_ratio=sizes["G"] / sizes["E"],
                decoder_embed_bias=decoder_embed_bias,
                decoder_class_token=decoder_class_token,
            )

    def heads(
        self, told: int | None, told_decoder: int | None, decoder_heads: Mapping[int, int]
    ) -> None:
        """Attention heads, which no shape tells; decoder_heads: those of the project's published
        decoders by width.
        """
        sides = [("num_heads", "encoder", "embed_dim", told, HEADS)]
        if self.has_decoder:
            sides.append(
                (
                    "decoder_num_heads",
                    "decoder",
                    "decoder_embed_dim",
                    told_decoder,
                    dict(decoder_heads),
                )
            )
        for key, side, width_key, said, published in sides:
            width = self.fields[width_key]
            guess = published.get(width)
            why = (
                f"as the published {side} that is {width} wide"
                if guess
                else f"no published {side} is {width} wide"
            )
            self.fields[key] = heads = self.settle(key, said, guess, why)
            if width % heads:
                raise self.wrong(
                    f"{key} = {heads} does not divide the {side}'s width of {width}; give {key}=..."
                )
        # it starts from random weights: the published one of this encoder, or the default
        if not self.has_decoder:
            preset = next(
                (
                    preset
                    for preset in PRESETS.values()
                    if preset["embed_dim"] == self.fields["embed_dim"]
                ),
                {},
            )
            self.fields.update(
                {key: value for key, value in preset.items() if key.startswith("decoder_")}
            )

    def clip(
        self,
        frames: int | None,
        height: int | None,
        width: int | None,
        *,
        times: int | None = None,
        places: int | None = None,
    ) -> None:
        """The clip's size as the source tells it; times, places: tokens of its position tables, a
        square unless told otherwise.
        """
        f = self.fields
        frames = times * f["tubelet_size"] if frames is None and times is not None else frames
        if (
            places is not None
            and height is None
            and width is None
            and self.facts.height is None
            and self.facts.width is None
        ):
            height = width = math.isqrt(places) * f["patch_size"]
            if math.isqrt(places) ** 2 != places:
                raise self.wrong(
                    f"has positions of {places} places, which is no square; give height=... width=..."
                )
        is_image = "t" not in self.found.sizes
        f["num_frames"] = self.settle(
            "num_frames", frames, 1 if is_image else USUAL_FRAMES, "as usual", firm=True
        )
        f["height"] = self.settle("height", height, USUAL_SIDE, "as usual", firm=True)
        f["width"] = self.settle("width", width, USUAL_SIDE, "as usual", firm=True)
        size = f"a clip of {f['num_frames']} x {f['height']} x {f['width']}"
        for key, unit in (
            ("num_frames", "tubelet_size"),
            ("height", "patch_size"),
            ("width", "patch_size"),
        ):
            if f[key] % f[unit]:
                raise self.wrong(
                    f"{key} = {f[key]} is no multiple of a tubelet's {f[unit]}; give {key}=..."
                )
        if math.prod(self.grid) > MAX_TOKENS:
            raise self.wrong(
                f"{size} has {math.prod(self.grid)} tokens; more than {MAX_TOKENS} are not believed"
            )
        ours = self.grid[0], self.grid[1] * self.grid[2]
        theirs = ours[0] if times is None else times, ours[1] if places is None else places
        if ours != theirs:
            raise self.wrong(
                f"has positions of {theirs[0]} times and {theirs[1]} places, {size} has {ours[0]} and {ours[1]}; give "
                "num_frames=... height=... width=..."
            )

    def table(self, name: str) -> torch.Tensor | None:
        """A table [1, A + N, D] of the file by its plain name, as [A + N, D]. Raises: ValueError
        for another shape.
        """
        if name not in self.found.rest:
            return None
        spelled = self.found.spelled[name]
        table = readable(self.found.rest[name], f"{self.source.path}: {spelled}")
        if table.dim() != 3 or table.shape[0] != 1:
            raise self.wrong(
                f"{spelled}: has shape {tuple(table.shape)}, which is no table of positions"
            )
        return table[0]

    def positions(
        self,
        kind: Literal["sinusoid", "sincos"],
        tables: Mapping[str, str],
        tolerance: float | None,
        *,
        required: bool,
    ) -> None:
        """Tables of the file (plain name by side) are not kept where they are what is computed
        here, to a tolerance.

        If one is another, or tolerance is None (they are learned), all are kept as parameters.
        Raises: ValueError.
        """
        f, found = self.fields, self.found
        kept: dict[str, torch.Tensor] = {}
        differences: dict[str, float] = {}
        for side in ("encoder", "decoder") if self.has_decoder else ("encoder",):
            width = f["embed_dim" if side == "encoder" else "decoder_embed_dim"]
            table_ND, class_row_D = computed_positions(kind, self.grid, width), torch.zeros(width)
            given = self.table(tables[side]) if side in tables else None
            if given is None and required:
                raise self.wrong(f"{tables[side]} is missing")
            if given is not None:
                spelled, more = found.spelled[tables[side]], len(given) - len(table_ND)
                if more not in (0, f["class_tokens"]) or given.shape[1] != width:
                    raise self.wrong(
                        f"{spelled}: has shape {(1, *given.shape)}, but a clip of {f['num_frames']} x {f['height']} x "
                        f"{f['width']} has {len(table_ND)} positions, {width} wide; give num_frames=... height=... width=..."
                    )
                class_row_D = given[0] if more else class_row_D
                differences[spelled] = (
                    math.inf
                    if table_ND.shape != given[more:].shape
                    else max(
                        float((given[more:] - table_ND).abs().max()), float(class_row_D.abs().max())
                    )
                )
                table_ND = given[more:]
                found.rest.pop(tables[side])
            kept[f"{side}.positions.table"] = table_ND
            if f["class_tokens"]:
                kept[f"{side}.positions.class_row"] = class_row_D
        worst = max(differences.values(), default=0.0)
        if differences and (tolerance is None or worst > tolerance):
            f["positions"] = "learned"
            found.ours.update(kept)
            found.used += len(differences)
            if tolerance is not None:
                self.notes.append(
                    f"positions = learned: the tables of the source differ by up to {worst:.1e} from what is computed here"
                )
            return
        f["positions"] = kind
        self.left_out.update(
            (spelled, "is computed here" + (f", equal to {difference:.0e}" if difference else ""))
            for spelled, difference in differences.items()
        )

    def statistics(
        self,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        *,
        usual: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        """Means and deviations of the input, the usual ones of RGB where the source does not say."""
        is_rgb = self.fields["in_channels"] == 3
        guesses, why = (usual, "as usual") if is_rgb else (((0.0,), (1.0,)), "for want of others")
        self.fields["mean"] = self.settle("mean", mean, guesses[0], why)
        self.fields["std"] = self.settle("std", std, guesses[1], why)

    def objective(
        self,
        told: str | None,
        guess: str,
        pixels: Literal["unit", "normalized"],
        context: str | None = None,
    ) -> None:
        """What pretraining minimises. Of an encoder alone it is what it would."""
        for key in ("sampling", "stride"):
            if getattr(self.facts, key) is not None:
                raise self.wrong(
                    f"has no classes, and {key}=... is how frames of a classifier are chosen"
                )
        self.fields["decoder_context"] = used = self.facts.decoder_context or context or "scored"
        if used == context == "all":
            self.notes.append(
                'decoder_context = all: as in its training; masks are then those of token_mask(..., decoder_context="all")'
            )
        self.head = ObjectiveConfig(
            normalize=self.settle("normalize", told, guess, "as published"), pixels=pixels
        )

    def classifier(
        self,
        names: tuple[str, ...] = (),
        sampling: str | None = None,
        stride: int | None = None,
        *,
        pooling: Literal["mean", "rest"] = "mean",
    ) -> None:
        """A head on the mean of the tokens where there is fc_norm, on the first token where there
        is not.

        Videos are resized without antialiasing, as the tests of all these projects do it.
        """
        classes, is_image = self.found.sizes["K"], self.fields["num_frames"] == 1
        guess, why = "dense", "as usual; models of Something-Something have sampling=uniform"
        if classes == SOMETHING_CLASSES:
            guess, why = (
                "uniform",
                f"as Something-Something has {SOMETHING_CLASSES} classes; others that many have sampling=dense",
            )
        kind = self.settle("sampling", "dense" if is_image else sampling, guess, why)
        if stride is None and (is_image or kind == "uniform"):  # then it chooses no frame
            stride = USUAL_STRIDE
        frames_apart = self.settle("stride", stride, USUAL_STRIDE, "as usual")
        self.head = ClassifierConfig(
            num_classes=classes,
            class_names=names,
            pooling=pooling if self.found.has("fc_norm.") else "first",
            sampling=kind,
            stride=frames_apart,
            antialias=self.fields["tubelet_size"] == 1,
        )

    def config(self) -> ModelConfig:
        """Raises: ValueError where the fields do not go together."""
        try:
            config = ModelConfig(**self.fields)
        except ValueError as error:
            raise self.wrong(str(error)) from None
        outputs = self.found.sizes.get("P", config.predicted_values)
        if outputs != config.predicted_values:
            raise self.wrong(
                f"its decoder predicts {outputs} values of a tubelet, which has {config.predicted_values}"
            )
        return config


def whole(values: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number that a source may tell, or None."""
    value = values.get(key)
    return value if type(value) is int and value >= 1 else None
