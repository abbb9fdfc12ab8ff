"""Files of VideoMAE, VideoMAE V2, MAE-pytorch (whose names VideoMAE took over, with a 2-D patch
embedding), and of mmaction2.
"""

import re
from dataclasses import replace

from video_mae.config import PRESETS
from video_mae.convert.architecture import Draft, told_by
from video_mae.convert.facts import Options
from video_mae.convert.project import Project

ROUNDING = 1e-6  # of one table computed in two ways; nothing is to be written back to the bit
DECODER_HEADS = {
    preset["decoder_embed_dim"]: preset["decoder_num_heads"] for preset in PRESETS.values()
}

# Wrappers fall off, and an encoder without a prefix (fine-tuned) gets the one that it has in
# pretraining.
SPELLINGS = (
    (r"(^|\.)_orig_mod\.", r"\1"),
    (r"^((module|backbone|model)\.)+", ""),
    (r"^encoder\.(fc_norm|head)\.", r"\1."),
    (r"^(patch_embed|blocks|norm)\.", r"encoder.\1."),
    (r"^(cls_token|pos_embed)$", r"encoder.\1"),
)
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
    spellings=SPELLINGS,
    positions={"encoder": "encoder.pos_embed", "decoder": "decoder.pos_embed"},
    tolerance=ROUNDING,
    decoder_heads=DECODER_HEADS,
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


def describe(draft: Draft) -> None:
    """The configuration of such a file; `args` of the training, or the folder's config.json, tell
    what the tensors do not.
    """
    options = draft.source.arguments
    # a folder of VideoMAE V2 on the Hugging Face hub
    if isinstance(draft.source.config.get("model_config"), dict):
        options = draft.source.config["model_config"]
    draft.told = told_by(options) | _frames(options)
    # a training of VideoMAE V2 tells of dual masking, an export of ours says it
    skipped, context = options.get("decoder_mask_ratio"), options.get("decoder_context")
    if context in ("scored", "all"):
        draft.told["decoder_context"] = context
    elif isinstance(skipped, float) and 0 < skipped < 1:
        draft.told["decoder_context"] = "all"
    draft.architecture()
    draft.clip()
    draft.positions()
    draft.purpose()


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
