"""Folders of Hugging Face transformers: VideoMAE and ViTMAE in the names of versions 4 and 5."""

from pathlib import Path
from typing import Any

from video_mae.convert.architecture import Draft, whole
from video_mae.convert.facts import Options
from video_mae.convert.foreign_files import read_json
from video_mae.convert.tensor_names import TensorNames, apart

# PyTorch's default, which VideoMAE's decoder.norm and fc_norm have there whatever config.json says
HEAD_NORM_EPS = 1e-5
# What configuration classes fill in where config.json leaves a key out.
SIZES = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
DEFAULTS: dict[str, Options] = {
    "videomae": {
        **SIZES,
        "num_frames": 16,
        "tubelet_size": 2,
        "use_mean_pooling": True,
        "decoder_num_attention_heads": 6,
        "decoder_hidden_size": 384,
        "decoder_num_hidden_layers": 4,
        "decoder_intermediate_size": 1536,
        "norm_pix_loss": True,
    },
    "vit_mae": {
        **SIZES,
        "num_frames": 1,
        "tubelet_size": 1,
        "decoder_num_attention_heads": 16,
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 8,
        "decoder_intermediate_size": 2048,
        "norm_pix_loss": False,
    },
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
VIDEOMAE = TensorNames(
    project="Hugging Face VideoMAE",
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
VITMAE = TensorNames(
    project="Hugging Face ViTMAE",
    spellings=(
        (r"(^|\.)_orig_mod\.", r"\1"),
        (r"^(vit\.)?layers\.", "vit.encoder.layer."),
        (r"^(embeddings|encoder|layernorm)\.", r"vit.\1."),
        (r"^decoder\.decoder_encoder\.layers?\.", "decoder.decoder_layers."),
    ),
    positions=("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"),
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
    is_image = draft.names is VITMAE
    config = {**DEFAULTS["vit_mae" if is_image else "videomae"], **draft.source.config}
    where = str(draft.source.path / "config.json")
    if config["hidden_act"] != "gelu":
        raise ValueError(
            f"{where}: hidden_act is {config['hidden_act']!r}; only gelu is known here"
        )
    draft.shapes(decoder_embed_bias=is_image)
    _compare(draft, config, where)
    height, width = _pair(config, "image_size", where)
    draft.told = {
        "num_heads": _whole(config, "num_attention_heads", where),
        "decoder_num_heads": _whole(config, "decoder_num_attention_heads", where),
        "num_frames": _whole(config, "num_frames", where),
        "height": height,
        "width": width,
        "normalized": _flag(config, "norm_pix_loss", where),
        **_statistics(draft.source.path),
    }
    draft.heads({})
    if draft.fields["embed_dim"] == 384 and draft.fields["num_heads"] == 16:
        draft.notes.append(
            "num_heads = 16: from config.json, but the official model that is 384 wide has 6, and "
            "the hub's conversions of it say 16; if this is one, give num_heads=6 "
            "decoder_num_heads=3"
        )
    draft.clip()
    eps = config["layer_norm_eps"]
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"{where}: layer_norm_eps is {eps!r}, not a number between 0 and 1")
    draft.fields.update(norm_eps=eps, head_norm_eps=eps if is_image else HEAD_NORM_EPS)
    if is_image:
        encoder, decoder = VITMAE.positions
        draft.positions("sincos", {"encoder": encoder, "decoder": decoder}, 0.0, required=True)
    else:
        draft.positions("sinusoid", {}, 0.0, required=False)
        if not draft.is_classifier:
            draft.fields["encoder_norm"] = not _flag(config, "use_mean_pooling", where)
        biases = [draft.ours[name] for name in draft.ours if name.endswith(("q_bias", "v_bias"))]
        if biases and not any(bool(tensor.any()) for tensor in biases):
            draft.notes.append(
                "all biases of queries and values are 0: early versions 5 of transformers lost "
                "them on loading a model"
            )
    draft.statistics()
    # VideoMAE takes ImageNet's statistics back out of RGB alone
    is_unit = not is_image and draft.fields["in_channels"] == 3
    if draft.is_classifier:
        draft.told["class_names"] = _names(config, draft.length("head.weight"), where)
        draft.classifier()
    else:
        draft.objective("tubelet" if is_image else "channel", "unit" if is_unit else "normalized")


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


def _compare(draft: Draft, config: Options, where: str) -> None:
    """Raises: ValueError where config.json and the tensors tell different architectures."""
    found = sizes(draft.fields) | {"tubelet_size": draft.fields["tubelet_size"]}
    for key, value in found.items():
        if _pair(config, key, where) != (value, value):
            raise ValueError(f"{where}: {key} is {config[key]}, but the weights have {value}")


def _whole(config: Options, key: str, where: str) -> int:
    value = whole(config, key)
    if value is None:
        raise ValueError(f"{where}: {key} is {config[key]!r}, not a positive whole number")
    return value


def _pair(config: Options, key: str, where: str) -> tuple[int, int]:
    """(height, width), of which a single number stands for both."""
    value = config[key]
    if not isinstance(value, list) or len(value) != 2:
        value = [value, value]
    height, width = (_whole({key: number}, key, where) for number in value)
    return height, width


def _flag(config: Options, key: str, where: str) -> bool:
    if not isinstance(config[key], bool):
        raise ValueError(f"{where}: {key} is {config[key]!r}, neither true nor false")
    return config[key]


def _statistics(folder: Path) -> dict[str, tuple[float, ...]]:
    """Means and deviations of the preprocessor, where one is in the folder."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            said = read_json(folder / name)
            mean, std = _numbers(said.get("image_mean")), _numbers(said.get("image_std"))
            if mean and std:
                return {"mean": mean, "std": std}
    return {}


def _numbers(values: Any) -> tuple[float, ...]:
    if isinstance(values, list) and all(isinstance(value, float | int) for value in values):
        return tuple(float(value) for value in values)
    return ()


def _names(config: Options, num_classes: int, where: str) -> tuple[str, ...]:
    """The classes' names, where config.json has more than its placeholders."""
    names = config.get("id2label", {})
    if not isinstance(names, dict):
        raise ValueError(f"{where}: id2label is no mapping of numbers and names")
    if all(name == f"LABEL_{number}" for number, name in names.items()):
        return ()
    numbers = [str(number) for number in range(num_classes)]
    if sorted(names) != sorted(numbers):
        raise ValueError(
            f"{where}: id2label does not name the classes 0 to {num_classes - 1} that the weights "
            "have"
        )
    return tuple(str(names[number]) for number in numbers)
