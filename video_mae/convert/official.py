"""Files of VideoMAE, VideoMAE V2, MAE-pytorch (whose names VideoMAE took over, with a 2-D patch
embedding), and of mmaction2; of image MAE, and of mae_st, its sequel for video.
"""

import re
from dataclasses import replace

from video_mae.config import PRESETS
from video_mae.convert.architecture import Draft
from video_mae.convert.facts import USUAL_FRAMES, Options
from video_mae.convert.project import Project, apart

# Names inside of a block: timm's, and what the official models have of their own.
TIMM = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "gamma_1": "gamma_1",
    "gamma_2": "gamma_2",
}
ONE_BIAS = {"attn.qkv.bias": "attn.qkv.bias"}
TWO_BIASES = {"attn.qkv.q_bias": "attn.q_bias", "attn.qkv.v_bias": "attn.v_bias"}

OFFICIAL = Project(
    name="VideoMAE",
    # Wrappers fall off, and an encoder without a prefix (fine-tuned) gets the one that it has in
    # pretraining.
    spellings=(
        (r"(^|\.)_orig_mod\.", r"\1"),
        (r"^((module|backbone|model)\.)+", ""),
        (r"^encoder\.(fc_norm|head)\.", r"\1."),
        (r"^(patch_embed|blocks|norm)\.", r"encoder.\1."),
        (r"^(cls_token|pos_embed)$", r"encoder.\1"),
    ),
    positions={"encoder": "encoder.pos_embed", "decoder": "decoder.pos_embed"},
    # of one table computed in two ways; nothing is to be written back to the bit
    tolerance=1e-6,
    decoder_heads={
        preset["decoder_embed_dim"]: preset["decoder_num_heads"] for preset in PRESETS.values()
    },
    outside={
        "encoder.patch_embed": "encoder.patch_embed.proj",
        "encoder.norm": "encoder.norm",
        "decoder.encoder_to_decoder": "encoder_to_decoder",
        "decoder.mask_token": "mask_token",
        "decoder.norm": "decoder.norm",
        "decoder.head": "decoder.head",
        "fc_norm": "fc_norm",
        "head": "head",
    },
    blocks={"encoder.blocks": "encoder.blocks", "decoder.blocks": "decoder.blocks"},
    inside=TIMM | TWO_BIASES,
    also=ONE_BIAS,  # of a fork
)

MMACTION = replace(
    OFFICIAL,
    name="mmaction2",
    outside={
        "encoder.patch_embed": "encoder.patch_embed.projection",
        "encoder.norm": "encoder.norm",
        "fc_norm": "fc_norm",
        "head": "cls_head.fc_cls",
    },
    inside=OFFICIAL.inside | {"mlp.0": "mlp.layers.0.0", "mlp.2": "mlp.layers.1"},
)


# our names of positions that are apart for space and time, and theirs
SEPARATE = {
    f"{side}.positions.{ours}": f"{prefix}pos_embed_{theirs}"
    for side, prefix in (("encoder", ""), ("decoder", "decoder_"))
    for ours, theirs in (("space", "spatial"), ("time", "temporal"), ("class_row", "class"))
}

MAE = Project(
    name="MAE",
    is_mae=True,
    spellings=(
        (r"(^|\.)_orig_mod\.", r"\1"),
        (r"^(module\.)+", ""),
        (r"^head\.projection\.", "head."),
    ),
    positions={"encoder": "pos_embed", "decoder": "decoder_pos_embed"},
    computed="sincos",
    decoder_heads={512: 16},
    outside={
        "encoder.patch_embed": "patch_embed.proj",
        "encoder.class_token": "cls_token",
        "encoder.norm": "norm",
        "decoder.encoder_to_decoder": "decoder_embed",
        "decoder.mask_token": "mask_token",
        "decoder.norm": "decoder_norm",
        "decoder.head": "decoder_pred",
        "fc_norm": "fc_norm",
        "head": "head",
    },
    blocks={"encoder.blocks": "blocks", "decoder.blocks": "decoder_blocks"},
    inside=TIMM | ONE_BIAS,
)
MAE_ST = replace(
    MAE,
    name="mae_st",
    positions=MAE.positions | SEPARATE,
    computed="sinusoid",
    tolerance=None,
    statistics=((0.45,) * 3, (0.225,) * 3),
    outside=MAE.outside | {"decoder.class_token": "decoder_cls_token"},
    inside={name: TIMM[name] for name in TIMM if "qkv" not in name}
    | apart("attn.q", "attn.k", "attn.v"),
)


def describe_videomae(draft: Draft) -> None:
    """The configuration of such a file; options of its training tell what the tensors do not."""
    options = draft.source.arguments
    draft.told |= _frames(options)
    # a training of VideoMAE V2 tells of dual masking, an export of ours says it
    skipped, context = options.get("decoder_mask_ratio"), options.get("decoder_context")
    if context in ("scored", "all"):
        draft.told["decoder_context"] = context
    elif isinstance(skipped, float) and 0 < skipped < 1:
        draft.told["decoder_context"] = "all"
    draft.clip()
    draft.positions()


def _frames(told: Options) -> Options:
    """How a classifier's frames are chosen, as the options of its training tell it, or the
    configuration that mmengine keeps as a text.
    """
    data_set, sparse, config = told.get("data_set"), told.get("sparse_sample"), told.get("cfg")
    if isinstance(config, str):
        return _frames_of_pipelines(config)
    if not isinstance(data_set, str) and not isinstance(sparse, bool):
        return {}
    is_something = re.search("ssv|sth|something", str(data_set), re.IGNORECASE)
    return {"sampling": "uniform" if sparse is True or is_something else "dense"}


def _frames_of_pipelines(config: str) -> Options:
    """Likewise; nothing where the pipelines of a configuration differ."""
    found: list[Options] = []
    for step in re.findall(r"dict\(([^()]*)\)", config):
        keys = dict(re.findall(r"(\w+)\s*=\s*['\"]?([\w.]+)", step))
        kind = keys.get("type", "").split(".")[-1]  # mmengine takes mmaction.SampleFrames too
        if kind in ("UniformSample", "UniformSampleFrames") or (
            kind == "SampleFrames" and keys.get("clip_len") == "1"
        ):
            found.append({"sampling": "uniform"})
        elif kind in ("SampleFrames", "DenseSampleFrames"):
            apart = keys.get("frame_interval", "1")
            stride = int(apart) if re.fullmatch(r"[1-9]\d{0,3}", apart) else None
            found.append({"sampling": "dense", "stride": stride})
    return found[0] if found and found.count(found[0]) == len(found) else {}


def describe_mae(draft: Draft) -> None:
    """The configuration of an image MAE."""
    draft.told["num_frames"] = None
    table = draft.table("pos_embed")
    draft.clip(places=None if table is None else len(table) - draft.fields["class_tokens"])
    draft.positions()


def describe_mae_st(draft: Draft) -> None:
    """The configuration of a mae_st: positions are learned, of space and time or joint ones."""
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
    if not class_tokens:
        draft.pooling = "rest"  # its classifier leaves the first token out of the mean all the same


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
