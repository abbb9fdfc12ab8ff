"""Folders of Hugging Face transformers: VideoMAE and ViTMAE in the names of versions 4 and 5."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from video_mae.convert.architecture import Draft, whole
from video_mae.convert.foreign_files import read_json
from video_mae.convert.layout import Layout, Rule, Words, block_rules, same

Version = Literal["v4", "v5"]

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
DEFAULTS: dict[str, dict[str, Any]] = {
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

_OUTER = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_V4 = {
    **_OUTER,
    "qkv": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_BIASES = tuple(f"attention.attention.{part}.bias" for part in ("query", "key", "value"))
VIDEOMAE_WORDS = {
    "v4": Words(**_V4, bias=("attention.attention.q_bias", "", "attention.attention.v_bias")),
    "v5": Words(**_V4, bias=_BIASES),
}
VITMAE_WORDS = {
    "v4": Words(**_V4, bias=_BIASES),
    "v5": Words(
        **_OUTER,
        qkv=tuple(f"attention.{part}_proj.weight" for part in "qkv"),
        bias=tuple(f"attention.{part}_proj.bias" for part in "qkv"),
        proj="attention.o_proj",
        fc1="mlp.fc1",
        fc2="mlp.fc2",
    ),
}
ENCODER_BLOCKS = {"v4": "encoder.layer", "v5": "layers"}  # of ViTMAE


def videomae(version: Version) -> Layout:
    """VideoMAE's names; those of the other version are read too."""
    words, other = (VIDEOMAE_WORDS[version], VIDEOMAE_WORDS["v5" if version == "v4" else "v4"])
    return Layout(
        project="Hugging Face VideoMAE",
        spellings=((r"(^|\.)_orig_mod\.", r"\1"), (r"^videomae\.", "")),
        rules=(
            *same("encoder.patch_embed", "embeddings.patch_embeddings.projection", "D C t p p"),
            *block_rules("encoder.blocks.*", "encoder.layer.*", "D", "H", words, other),
            *same("encoder.norm", "layernorm", "D"),
            *same("decoder.encoder_to_decoder", "encoder_to_decoder", "E D"),
            Rule(("decoder.mask_token",), ("mask_token",), "1 1 E"),
            *block_rules("decoder.blocks.*", "decoder.decoder_layers.*", "E", "G", words, other),
            *same("decoder.norm", "decoder.norm", "E"),
            *same("decoder.head", "decoder.head", "P E"),
            *same("fc_norm", "fc_norm", "D"),
            *same("head", "classifier", "K D"),
        ),
    )


def vit_mae(version: Version) -> Layout:
    """ViTMAE's names; transformers 5.18 writes its decoder's blocks under decoder_encoder.layer,
    which is read too.
    """
    words, other = (VITMAE_WORDS[version], VITMAE_WORDS["v5" if version == "v4" else "v4"])
    blocks = ENCODER_BLOCKS[version]
    return Layout(
        project="Hugging Face ViTMAE",
        spellings=(
            (r"(^|\.)_orig_mod\.", r"\1"),
            (r"^vit\.", ""),
            (r"^(encoder\.layer|layers)\.", f"{blocks}."),
            (
                r"^decoder\.(decoder_encoder\.layer|decoder_encoder\.layers)\.",
                "decoder.decoder_layers.",
            ),
        ),
        positions=("embeddings.position_embeddings", "decoder.decoder_pos_embed"),
        rules=(
            *same("encoder.patch_embed", "embeddings.patch_embeddings.projection", "D C p p"),
            Rule(("encoder.class_token",), ("embeddings.cls_token",), "1 1 D"),
            *block_rules("encoder.blocks.*", f"{blocks}.*", "D", "H", words, other),
            *same("encoder.norm", "layernorm", "D"),
            *same("decoder.encoder_to_decoder", "decoder.decoder_embed", "E D"),
            Rule(("decoder.mask_token",), ("decoder.mask_token",), "1 1 E"),
            *block_rules("decoder.blocks.*", "decoder.decoder_layers.*", "E", "G", words, other),
            *same("decoder.norm", "decoder.decoder_norm", "E"),
            *same("decoder.head", "decoder.decoder_pred", "P E"),
        ),
    )


def describe(draft: Draft) -> None:
    """The configuration of a folder: config.json tells it, and the tensors must agree."""
    folder, kind = (
        draft.source.path,
        "vit_mae" if draft.found.layout.project.endswith("ViTMAE") else "videomae",
    )
    if not draft.source.config:
        raise draft.wrong("has no config.json beside it; give the folder that holds both")
    config = {**DEFAULTS[kind], **draft.source.config}
    where = f"{folder / 'config.json'}"
    if config["hidden_act"] != "gelu":
        raise ValueError(
            f"{where}: hidden_act is {config['hidden_act']!r}; only gelu is known here"
        )
    draft.shapes(decoder_embed_bias=kind == "vit_mae")
    _compare(draft, config, where)
    draft.heads(
        _whole(config, "num_attention_heads", where),
        _whole(config, "decoder_num_attention_heads", where),
        {},
    )
    if draft.fields["embed_dim"] == 384 and draft.fields["num_heads"] == 16:
        draft.notes.append(
            "num_heads = 16: from config.json, but the official model that is 384 wide has 6, and the hub's conversions of "
            "it say 16; if this is one, give num_heads=6 decoder_num_heads=3"
        )
    draft.clip(_whole(config, "num_frames", where), *_pair(config, "image_size", where))
    draft.fields.update(
        norm_eps=_eps(config, where),
        head_norm_eps=_eps(config, where) if kind == "vit_mae" else HEAD_NORM_EPS,
    )
    if kind == "vit_mae":
        draft.positions(
            "sincos",
            {"encoder": "embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"},
            0.0,
            required=True,
        )
    else:
        draft.positions("sinusoid", {}, None, required=False)
        if not draft.is_classifier:
            draft.fields["encoder_norm"] = not _flag(config, "use_mean_pooling", where)
        biases = [
            tensor
            for name, tensor in draft.found.ours.items()
            if name.endswith(("q_bias", "v_bias"))
        ]
        if biases and not any(bool(tensor.any()) for tensor in biases):
            draft.notes.append(
                "all biases of queries and values are 0: early versions 5 of transformers lost them on loading a model"
            )
    draft.statistics(*_statistics(folder))
    if draft.is_classifier:
        draft.classifier(_names(config, draft.found.sizes["K"], where))
        return
    normalized = _flag(config, "norm_pix_loss", where)
    # VideoMAE takes ImageNet's statistics back out of RGB alone
    unit = kind == "videomae" and draft.fields["in_channels"] == 3
    how = ("tubelet" if kind == "vit_mae" else "channel") if normalized else "none"
    draft.objective(how, how, "unit" if unit else "normalized")


def _compare(draft: Draft, config: Mapping[str, Any], where: str) -> None:
    """Raises: ValueError where config.json and the tensors tell different architectures."""
    f, sizes = draft.fields, draft.found.sizes
    found = {
        "hidden_size": sizes["D"],
        "num_hidden_layers": f["depth"],
        "intermediate_size": sizes["H"],
        "num_channels": sizes["C"],
        "tubelet_size": f["tubelet_size"],
    }
    if draft.has_decoder:
        found |= {
            "decoder_hidden_size": sizes["E"],
            "decoder_num_hidden_layers": f["decoder_depth"],
            "decoder_intermediate_size": sizes["G"],
        }
    for key, value in found.items():
        if _whole(config, key, where) != value:
            raise ValueError(f"{where}: {key} is {config[key]}, but the weights have {value}")
    if _pair(config, "patch_size", where) != (sizes["p"], sizes["p"]):
        raise ValueError(
            f"{where}: patch_size is {config['patch_size']}, but the weights have {sizes['p']} x {sizes['p']}"
        )


def _whole(config: Mapping[str, Any], key: str, where: str) -> int:
    value = whole(config, key)
    if value is None:
        raise ValueError(f"{where}: {key} is {config[key]!r}, not a positive whole number")
    return value


def _pair(config: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    """(height, width), of which a single number stands for both."""
    values = (
        config[key]
        if isinstance(config[key], list) and len(config[key]) == 2
        else [config[key]] * 2
    )
    return _whole({key: values[0]}, key, where), _whole({key: values[1]}, key, where)


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    if not isinstance(config[key], bool):
        raise ValueError(f"{where}: {key} is {config[key]!r}, neither true nor false")
    return config[key]


def _eps(config: Mapping[str, Any], where: str) -> float:
    value = config["layer_norm_eps"]
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"{where}: layer_norm_eps is {value!r}, not a number between 0 and 1")
    return value


def _statistics(folder: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Means and deviations of the preprocessor, where one is in the folder."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file():
            preprocessor = read_json(path)
            values = [preprocessor.get(key) for key in ("image_mean", "image_std")]
            if all(
                isinstance(value, list)
                and value
                and all(isinstance(item, float | int) for item in value)
                for value in values
            ):
                mean, std = (tuple(float(item) for item in value) for value in values if value)
                return mean, std
    return None, None


def _names(config: Mapping[str, Any], num_classes: int, where: str) -> tuple[str, ...]:
    """The classes' names, where config.json has more than its placeholders."""
    names = config.get("id2label", {})
    if not isinstance(names, dict):
        raise ValueError(
            f"{where}: id2label is {type(names).__name__}, not a mapping of numbers and names"
        )
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return ()
    if sorted(names) != sorted(str(number) for number in range(num_classes)):
        raise ValueError(
            f"{where}: id2label does not name the classes 0 to {num_classes - 1} that the weights have"
        )
    return tuple(str(names[str(number)]) for number in range(num_classes))
