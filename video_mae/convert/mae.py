"""Files of image MAE and of mae_st, its sequel for video: class tokens, stored positions, other
normalisation.
"""

from video_mae.convert.architecture import Draft, told_by
from video_mae.convert.facts import USUAL_FRAMES
from video_mae.convert.official import ONE_BIAS, TIMM
from video_mae.convert.project import Project, apart

DECODER_HEADS = {512: 16}

SPELLINGS = (
    (r"(^|\.)_orig_mod\.", r"\1"),
    (r"^(module\.)+", ""),
    (r"^head\.projection\.", "head."),
)
OUTSIDE = {
    "encoder.patch_embed": "patch_embed.proj",
    "encoder.class_token": "cls_token",
    "encoder.norm": "norm",
    "decoder.encoder_to_decoder": "decoder_embed",
    "decoder.mask_token": "mask_token",
    "decoder.norm": "decoder_norm",
    "decoder.head": "decoder_pred",
    "fc_norm": "fc_norm",
    "head": "head",
}
BLOCKS = {"encoder.blocks": "blocks", "decoder.blocks": "decoder_blocks"}
JOINT = {"encoder": "pos_embed", "decoder": "decoder_pos_embed"}
# our names of positions that are apart for space and time, and theirs
SEPARATE = {
    f"{side}.positions.{ours}": f"{prefix}pos_embed_{theirs}"
    for side, prefix in (("encoder", ""), ("decoder", "decoder_"))
    for ours, theirs in (("space", "spatial"), ("time", "temporal"), ("class_row", "class"))
}

MAE = Project(
    name="MAE",
    is_mae=True,
    spellings=SPELLINGS,
    positions=JOINT,
    computed="sincos",
    decoder_heads=DECODER_HEADS,
    outside=OUTSIDE,
    blocks=BLOCKS,
    inside=TIMM | ONE_BIAS,
)
MAE_ST = Project(
    name="mae_st",
    is_mae=True,
    spellings=SPELLINGS,
    positions=JOINT | SEPARATE,
    tolerance=None,
    decoder_heads=DECODER_HEADS,
    statistics=((0.45,) * 3, (0.225,) * 3),
    outside=OUTSIDE | {"decoder.class_token": "decoder_cls_token"},
    blocks=BLOCKS,
    inside={name: TIMM[name] for name in TIMM if "qkv" not in name}
    | apart("attn.q", "attn.k", "attn.v"),
)


def describe(draft: Draft) -> None:
    """The configuration of an image MAE."""
    draft.told = told_by(draft.source.arguments) | {"num_frames": None}
    draft.architecture()
    table = draft.table("pos_embed")
    draft.clip(places=None if table is None else len(table) - draft.fields["class_tokens"])
    draft.positions()
    draft.purpose()


def describe_st(draft: Draft) -> None:
    """The configuration of a mae_st: positions are learned, of space and time or joint ones."""
    draft.told = told_by(draft.source.arguments)
    draft.architecture()
    class_tokens = draft.fields["class_tokens"]
    space, time = draft.table("pos_embed_spatial"), draft.table("pos_embed_temporal")
    table = draft.table("pos_embed")
    if space is not None and time is not None:
        draft.clip(times=len(time), places=len(space))
        _separate(draft)
    elif table is not None:
        frames = draft.settle("num_frames", USUAL_FRAMES, "as usual", firm=True)
        draft.told["num_frames"] = frames
        tokens, times = len(table) - class_tokens, frames // draft.fields["tubelet_size"]
        if not times or tokens % times:
            raise draft.wrong(
                f"has {tokens} positions, no multiple of the {times} times of {frames} frames; "
                "give num_frames=..."
            )
        draft.clip(times=times, places=tokens // times)
        draft.positions()
    else:
        raise draft.wrong(
            "has no positions: neither pos_embed nor pos_embed_spatial and pos_embed_temporal"
        )
    if draft.has_decoder:
        a_frame = draft.fields["patch_size"] ** 2 * draft.fields["in_channels"]
        outputs = draft.length("decoder.head.weight")
        per_tubelet, left = divmod(outputs, a_frame)
        if left or not per_tubelet:
            raise draft.wrong(
                f"its decoder predicts {outputs} values of a tubelet, no whole frames of {a_frame}"
            )
        if per_tubelet != draft.fields["tubelet_size"]:
            draft.fields["predicted_frames"] = per_tubelet * draft.grid[0]
    if draft.is_classifier and not draft.has("fc_norm."):  # its norm comes after the mean
        for name in [name for name in draft.ours if name.startswith("encoder.norm.")]:
            draft.ours[name.replace("encoder.norm", "fc_norm")] = draft.ours.pop(name)
    # Its classifier leaves the first token out of the mean, where there is no class token too.
    draft.purpose("mean" if class_tokens else "rest")


def _separate(draft: Draft) -> None:
    draft.fields["positions"] = "separate"
    for ours, name in SEPARATE.items():
        table = draft.table(name)
        if table is None or not ours.startswith(draft.sides):
            continue
        if ours.endswith("class_row"):
            if len(table) != 1:
                raise draft.wrong(f"{name}: has {len(table)} rows, there is one class token")
            table = table[0]
        draft.ours[ours] = table
        draft.unknown.pop(name)
