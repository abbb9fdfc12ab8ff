"""Files of image MAE and of mae_st, its sequel for video: class tokens, stored positions, other
normalisation.
"""

from typing import Literal

from video_mae.config import IMAGENET_MEAN, IMAGENET_STD
from video_mae.convert.architecture import USUAL_FRAMES, Draft, whole
from video_mae.convert.layout import Layout, Rule, Words, block_rules, same

DECODER_HEADS = {512: 16}
MAE_ST_MEAN, MAE_ST_STD = (0.45,) * 3, (0.225,) * 3

SPELLINGS = (
    (r"(^|\.)_orig_mod\.", r"\1"),
    (r"^(module\.)+", ""),
    (r"^head\.projection\.", "head."),
)
PACKED = Words(bias=("attn.qkv.bias",))
APART = Words(
    qkv=("attn.q.weight", "attn.k.weight", "attn.v.weight"),
    bias=("attn.q.bias", "attn.k.bias", "attn.v.bias"),
)


def _layout(
    project: str, patch_embed: str, words: Words, positions: tuple[str, ...], *own: Rule
) -> Layout:
    return Layout(
        project=project,
        spellings=SPELLINGS,
        positions=positions,
        rules=(
            *same("encoder.patch_embed", "patch_embed.proj", patch_embed),
            Rule(("encoder.class_token",), ("cls_token",), "1 1 D"),
            *block_rules("encoder.blocks.*", "blocks.*", "D", "H", words),
            *same("encoder.norm", "norm", "D"),
            *same("decoder.encoder_to_decoder", "decoder_embed", "E D"),
            Rule(("decoder.mask_token",), ("mask_token",), "1 1 E"),
            *own,
            *block_rules("decoder.blocks.*", "decoder_blocks.*", "E", "G", words),
            *same("decoder.norm", "decoder_norm", "E"),
            *same("decoder.head", "decoder_pred", "P E"),
            *same("fc_norm", "fc_norm", "D"),
            *same("head", "head", "K D"),
        ),
    )


JOINT = {"encoder": "pos_embed", "decoder": "decoder_pos_embed"}
SEPARATE = tuple(
    f"{side}pos_embed_{axis}"
    for side in ("", "decoder_")
    for axis in ("spatial", "temporal", "class")
)
MAE = _layout("MAE", "D C p p", PACKED, tuple(JOINT.values()))
MAE_ST = _layout(
    "mae_st",
    "D C t p p",
    APART,
    (*JOINT.values(), *SEPARATE),
    Rule(("decoder.class_token",), ("decoder_cls_token",), "1 1 E"),
)


def describe(draft: Draft) -> None:
    """The configuration of an image MAE."""
    told = draft.source.arguments
    draft.shapes(decoder_embed_bias=True)
    draft.heads(whole(told, "num_heads"), whole(told, "decoder_num_heads"), DECODER_HEADS)
    table, size = draft.table("pos_embed"), whole(told, "input_size")
    draft.clip(
        None,
        size,
        size,
        places=None if table is None else len(table) - draft.fields["class_tokens"],
    )
    draft.positions("sincos", JOINT, 0.0, required=True)
    _purpose(draft)


def describe_st(draft: Draft) -> None:
    """The configuration of a mae_st: positions are learned, together or apart for space and time."""
    told = draft.source.arguments
    draft.shapes(decoder_embed_bias=True, decoder_class_token="own")
    draft.heads(whole(told, "num_heads"), whole(told, "decoder_num_heads"), DECODER_HEADS)
    size, class_tokens = whole(told, "input_size"), draft.fields["class_tokens"]
    frames = whole(told, "num_frames")
    space, time, table = (
        draft.table(name) for name in ("pos_embed_spatial", "pos_embed_temporal", "pos_embed")
    )
    if space is not None and time is not None:
        draft.clip(frames, size, size, times=len(time), places=len(space))
        _separate(draft)
    elif table is not None:
        frames = draft.settle("num_frames", frames, USUAL_FRAMES, "as usual", firm=True)
        tokens, times = len(table) - class_tokens, frames // draft.fields["tubelet_size"]
        if not times or tokens % times:
            raise draft.wrong(
                f"has {tokens} positions, no multiple of the {times} times of {frames} frames; give num_frames=..."
            )
        draft.clip(frames, size, size, times=times, places=tokens // times)
        draft.positions("sinusoid", JOINT, None, required=True)
    else:
        raise draft.wrong(
            "has no positions: neither pos_embed nor pos_embed_spatial and pos_embed_temporal"
        )
    if draft.has_decoder:
        a_frame = draft.fields["patch_size"] ** 2 * draft.fields["in_channels"]
        outputs = draft.found.sizes.get("P", a_frame * draft.fields["tubelet_size"])
        per_tubelet, left = divmod(outputs, a_frame)
        if left or not per_tubelet:
            raise draft.wrong(
                f"its decoder predicts {outputs} values of a tubelet, which are no whole frames of {a_frame}"
            )
        if per_tubelet != draft.fields["tubelet_size"]:
            draft.fields["predicted_frames"] = per_tubelet * draft.grid[0]
    if draft.is_classifier and not draft.found.has("fc_norm."):  # its norm comes after the mean
        for name in [name for name in draft.found.ours if name.startswith("encoder.norm.")]:
            draft.found.ours[name.replace("encoder.norm", "fc_norm")] = draft.found.ours.pop(name)
    # Its classifier leaves the first token out of the mean, where there is no class token too.
    _purpose(draft, (MAE_ST_MEAN, MAE_ST_STD), "mean" if class_tokens else "rest")


def _separate(draft: Draft) -> None:
    draft.fields["positions"] = "separate"
    for side, prefix in (
        (("encoder", ""), ("decoder", "decoder_")) if draft.has_decoder else (("encoder", ""),)
    ):
        for ours, name in (("space", "spatial"), ("time", "temporal"), ("class_row", "class")):
            table = draft.table(f"{prefix}pos_embed_{name}")
            if table is None:
                continue
            if ours == "class_row" and len(table) != 1:
                raise draft.wrong(
                    f"{prefix}pos_embed_class: has {len(table)} rows, there is one class token"
                )
            draft.found.ours[f"{side}.positions.{ours}"] = (
                table[0] if ours == "class_row" else table
            )
            draft.found.rest.pop(f"{prefix}pos_embed_{name}")
            draft.found.used += 1


def _purpose(
    draft: Draft,
    usual: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD),
    pooling: Literal["mean", "rest"] = "mean",
) -> None:
    told = draft.source.arguments
    draft.statistics(usual=usual)
    if draft.is_classifier:
        draft.classifier(stride=whole(told, "sampling_rate"), pooling=pooling)
    else:
        normalized = told.get("norm_pix_loss")
        draft.objective(
            {True: "tubelet", False: "none"}[normalized] if isinstance(normalized, bool) else None,
            "tubelet",
            "normalized",
        )
