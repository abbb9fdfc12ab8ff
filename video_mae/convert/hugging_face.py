"""Folders of Hugging Face transformers: VideoMAE and ViTMAE in the names of versions 4 and 5."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from video_mae.convert.architecture import Draft, whole
from video_mae.convert.facts import Options
from video_mae.convert.foreign_files import read_json
from video_mae.convert.project import Project, apart

# PyTorch's default, which VideoMAE's decoder.norm and fc_norm have there whatever config.json says
HEAD_NORM_EPS = 1e-5
# What configuration classes fill in where config.json leaves out what the tensors do not tell.
USUAL: Options = {
    "image_size": 224,
    "num_frames": 16,
    "num_attention_heads": 12,
    "decoder_num_attention_heads": 6,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": True,
    "norm_pix_loss": True,
}
USUAL_IMAGE: Options = {
    **USUAL,
    "num_frames": 1,
    "decoder_num_attention_heads": 16,
    "norm_pix_loss": False,
}

VERSION_4 = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
    **apart(*(f"attention.attention.{part}" for part in ("query", "key", "value"))),
}
VERSION_5 = {
    "attn.proj": "attention.o_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    **apart(*(f"attention.{letter}_proj" for letter in "qkv")),
}

# Written are the names of version 4, which version 5 reads too.
VIDEOMAE = Project(
    name="Hugging Face's VideoMAE",
    is_unit_in_rgb_alone=True,
    spellings=(
        (r"(^|\.)_orig_mod\.", r"\1"),
        (r"^(embeddings|encoder|layernorm)\.", r"videomae.\1."),
    ),
    outside={
        "encoder.patch_embed": "videomae.embeddings.patch_embeddings.projection",
        "encoder.norm": "videomae.layernorm",
        "decoder.encoder_to_decoder": "encoder_to_decoder",
        "decoder.mask_token": "mask_token",
        "decoder.norm": "decoder.norm",
        "decoder.head": "decoder.head",
        "fc_norm": "fc_norm",
        "head": "classifier",
    },
    blocks={"encoder.blocks": "videomae.encoder.layer", "decoder.blocks": "decoder.decoder_layers"},
    inside={name: VERSION_4[name] for name in VERSION_4 if not name.endswith("_bias")}
    | {f"attn.qkv.{part}_bias": f"attention.attention.{part}_bias" for part in "qv"},
    also=VERSION_4,  # with the biases of version 5
)
VITMAE = Project(
    name="Hugging Face's ViTMAE",
    is_mae=True,
    computed="sincos",
    spellings=(
        (r"(^|\.)_orig_mod\.", r"\1"),
        (r"^(vit\.)?layers\.", "vit.encoder.layer."),
        (r"^(embeddings|encoder|layernorm)\.", r"vit.\1."),
        (r"^decoder\.decoder_encoder\.layers?\.", "decoder.decoder_layers."),
    ),
    positions={
        "encoder": "vit.embeddings.position_embeddings",
        "decoder": "decoder.decoder_pos_embed",
    },
    outside={
        "encoder.patch_embed": "vit.embeddings.patch_embeddings.projection",
        "encoder.class_token": "vit.embeddings.cls_token",
        "encoder.norm": "vit.layernorm",
        "decoder.encoder_to_decoder": "decoder.decoder_embed",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.norm": "decoder.decoder_norm",
        "decoder.head": "decoder.decoder_pred",
    },
    blocks={"encoder.blocks": "vit.encoder.layer", "decoder.blocks": "decoder.decoder_layers"},
    inside=VERSION_4,
    also=VERSION_5,
)


def describe(draft: Draft) -> None:
    """The configuration of a folder: config.json tells it, and the tensors must agree."""
    if not draft.source.config:
        raise draft.wrong("has no config.json beside it; give the folder that holds both")
    is_image = draft.project is VITMAE
    config = {**(USUAL_IMAGE if is_image else USUAL), **draft.source.config}

    def require(is_right: bool, key: str, wanted: str) -> None:
        if not is_right:
            raise draft.wrong(f"config.json: {key} is {config[key]!r}, not {wanted}")

    def number(key: str) -> int | None:
        found = whole(config, key)
        require(found is not None, key, "a positive whole number")
        return found

    def flag(key: str) -> bool:
        require(isinstance(config[key], bool), key, "true or false")
        return config[key]

    require(config["hidden_act"] == "gelu", "hidden_act", "gelu, which alone is known here")
    size = config["image_size"]
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    sides: Options = {"height": height, "width": width}
    is_size = None not in (whole(sides, "height"), whole(sides, "width"))
    require(is_size, "image_size", "a positive whole number, or two")
    draft.told |= {
        "num_heads": number("num_attention_heads"),
        "decoder_num_heads": number("decoder_num_attention_heads"),
        "num_frames": number("num_frames"),
        "normalized": flag("norm_pix_loss"),
        **sides,
        **_statistics(draft.source.path),
    }
    f = draft.fields
    for key, value in (sizes(f) | {"tubelet_size": f["tubelet_size"]}).items():
        is_right = config.get(key, value) in (value, [value, value])
        require(is_right, key, f"the {value} that the weights have")
    if f["embed_dim"] == 384 and (draft.facts.num_heads or draft.told["num_heads"]) == 16:
        draft.notes.append(
            "num_heads = 16: from config.json, but the official model that is 384 wide has 6, and "
            "the hub's conversions of it say 16; if this is one, give num_heads=6 "
            "decoder_num_heads=3"
        )
    draft.clip()
    eps = config["layer_norm_eps"]
    require(isinstance(eps, float) and 0 < eps < 1, "layer_norm_eps", "between 0 and 1")
    f.update(norm_eps=eps, head_norm_eps=eps if is_image else HEAD_NORM_EPS)
    draft.positions()
    if not is_image:
        if not draft.is_classifier:
            f["encoder_norm"] = not flag("use_mean_pooling")
        biases = [draft.ours[name] for name in draft.ours if name.endswith(("q_bias", "v_bias"))]
        if biases and not any(bool(tensor.any()) for tensor in biases):
            draft.notes.append(
                "all biases of queries and values are 0: early versions 5 of transformers lost "
                "them on loading a model"
            )
    if draft.is_classifier:
        draft.told["class_names"] = _names(draft, config.get("id2label", {}))


def sizes(fields: Options) -> dict[str, int]:
    """What config.json says of a model, by what a ModelConfig does; without a decoder, where it has
    none.
    """
    said = {"num_channels": fields["in_channels"], "patch_size": fields["patch_size"]}
    for side in ("", "decoder_"):
        width = fields.get(f"{side}embed_dim")
        if width:
            said[f"{side}hidden_size"] = width
            said[f"{side}num_hidden_layers"] = fields[f"{side}depth"]
            said[f"{side}intermediate_size"] = round(width * fields[f"{side}mlp_ratio"])
    return said


def _statistics(folder: Path) -> Options:
    """Means and deviations of the preprocessor, where one is in the folder."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            said = read_json(folder / name)
            with suppress(KeyError, TypeError, ValueError):  # some say nothing, or no numbers
                mean, std = (tuple(map(float, said[f"image_{key}"])) for key in ("mean", "std"))
                if mean and std:
                    return {"mean": mean, "std": std}
    return {}


def _names(draft: Draft, names: Any) -> tuple[str, ...]:
    """The classes' names, where config.json has more than its placeholders."""
    if not isinstance(names, dict):
        raise draft.wrong("config.json: id2label is no mapping of numbers and names")
    if all(name == f"LABEL_{number}" for number, name in names.items()):
        return ()
    numbers = [str(number) for number in range(draft.length("head.weight"))]
    if sorted(names) != sorted(numbers):
        raise draft.wrong(
            f"config.json: id2label does not name the {len(numbers)} classes that the weights have"
        )
    return tuple(str(names[number]) for number in numbers)
