"""Models of ours as others read them: the official file, Hugging Face folders, a program of
torch.export.

What a format cannot hold is refused where the outputs would be others, and told where they stay the
same.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from video_mae.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from video_mae.convert import hugging_face
from video_mae.convert.architecture import SOMETHING_CLASSES, USUAL_STRIDE
from video_mae.convert.hugging_face import Version
from video_mae.convert.layout import Layout, write
from video_mae.convert.official import OFFICIAL
from video_mae.files import json_text, write_whole
from video_mae.model.blocks import Attention
from video_mae.model.vit import Encoder, VideoClassifier, VideoMAE

Model = VideoMAE | VideoClassifier
PLAIN = {"class_tokens": 0, "decoder_embed_bias": False, "predicted_frames": None}


def export_official(model: Model, path: str | Path) -> list[str]:
    """Writes a file that the code of VideoMAE and VideoMAE V2 loads: {"model": state, "args": what
    its names do not tell}.

    Returns: remarks on what the file does not say. Raises: ValueError for a model that this code
    has no place for.
    """
    c = model.config
    is_classifier, has_learned = isinstance(model, VideoClassifier), c.positions == "learned"
    if has_learned and not is_classifier:
        raise ValueError(
            "format: the official VideoMAE has learned positions in its classifiers alone (use_learnable_pos_emb); those of "
            "its decoder are always computed"
        )
    required = PLAIN if is_classifier else {**PLAIN, "encoder_norm": True}
    _require(
        model,
        "the official VideoMAE",
        required if has_learned else {**required, "positions": "sinusoid"},
    )
    remarks = _differences(
        model,
        "the official VideoMAE",
        "channel",
        "unit",
        norm_eps=1e-6,
        head_norm_eps=1e-6,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("positions.table")
    }
    state, left = _named(model, OFFICIAL, own)
    if has_learned:
        state["encoder.pos_embed"] = model.encoder.positions(c.grid)[0][None].detach().float().cpu()
        remarks.append(
            "pos_embed: is read by the official class where it is made with use_learnable_pos_emb=True"
        )
    if c.tubelet_size == c.num_frames == 1:
        embed = "encoder.patch_embed.proj.weight"
        state[embed] = state[embed].squeeze(2)
        remarks.append(
            "patch_embed.proj.weight: is that of a Conv2d, which MAE-pytorch loads; VideoMAE's own class has a Conv3d"
        )
    if is_classifier:
        state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    arguments: dict[str, Any] = {
        "num_frames": c.num_frames,
        "height": c.height,
        "width": c.width,
        "num_heads": c.num_heads,
    }
    if isinstance(model, VideoMAE):
        arguments |= {
            "decoder_num_heads": c.decoder_num_heads,
            "normlize_target": model.objective_config.normalize == "channel",
            "decoder_context": c.decoder_context,
        }
    else:
        head = model.classifier_config
        arguments |= {"sparse_sample": head.sampling != "dense", "sampling_rate": head.stride}
    write_whole(
        Path(path), lambda building: torch.save({"model": state, "args": arguments}, building)
    )
    return remarks + left


def export_hugging_face(model: Model, folder: str | Path, version: Version = "v4") -> list[str]:
    """Writes a folder that from_pretrained of transformers opens as VideoMAE, or as ViTMAE where
    the model has a class token.

    version: of transformers whose names are used; "v4" is also what version 5 reads and writes.
    Returns: remarks on what the folder does not say. Raises: ValueError for a model that these
    classes have no place for.
    """
    export = _vit_mae if model.config.class_tokens else _videomae
    state, config, remarks = export(model, version)
    c = model.config
    mean, std = (
        list(values) * (1 if len(values) == c.in_channels else c.in_channels)
        for values in (c.mean, c.std)
    )
    preprocessor = {
        "image_processor_type": "ViTImageProcessor" if c.class_tokens else "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"height": c.height, "width": c.width}
        if c.class_tokens
        else {"shortest_edge": min(c.height, c.width)},
        "do_center_crop": not c.class_tokens,
        "crop_size": {"height": c.height, "width": c.width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }

    def fill(building: Path) -> None:
        building.mkdir()
        save_file(state, building / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
            (building / name).write_text(json_text(content, indent=2) + "\n", encoding="utf-8")

    write_whole(Path(folder), fill)
    return remarks


def export_program(model: Model, path: str | Path) -> list[str]:
    """Writes a classifier as a program of torch.export (.pt2): uint8 clips [B, T, H, W, C] of any
    number in, logits [B, K] out.

    It needs PyTorch alone to run. Raises: ValueError for a model without a head.
    """
    if not isinstance(model, VideoClassifier):
        raise ValueError(
            "format: torch_export is for classifiers, and this model is a VideoMAE; fine-tune it first"
        )
    c, portable = model.config, copy.deepcopy(model).cpu().eval()
    for module in portable.modules():
        if isinstance(module, Encoder | Attention):
            module.impl = "sdpa" if isinstance(module, Attention) else "reference"
    clip_BTHWC = torch.zeros(2, c.num_frames, c.height, c.width, c.in_channels, dtype=torch.uint8)
    program = torch.export.export(
        portable, (clip_BTHWC,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    write_whole(Path(path), lambda building: torch.export.save(program, building))
    return []


def _videomae(
    model: Model, version: Version
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    c, name = model.config, "Hugging Face's VideoMAE"
    _require(model, name, {**PLAIN, "positions": "sinusoid", "layer_scale": 0.0})
    remarks = _differences(
        model,
        name,
        "channel",
        "unit" if c.in_channels == 3 else "normalized",
        head_norm_eps=hugging_face.HEAD_NORM_EPS,
    )
    config = {
        **_sizes(c),
        "model_type": "videomae",
        "num_frames": c.num_frames,
        "tubelet_size": c.tubelet_size,
        "qv_bias": c.qkv_bias != "none",
    }
    if isinstance(model, VideoMAE):
        if c.in_channels == 3 and c.mean != IMAGENET_MEAN:
            remarks.append(
                f"targets: {name} computes them as if the input were normalised by ImageNet's mean and std"
            )
        config |= {
            "architectures": ["VideoMAEForPreTraining"],
            "use_mean_pooling": not c.encoder_norm,
            "norm_pix_loss": model.objective_config.normalize == "channel",
        }
    else:
        head = model.classifier_config
        names = head.class_names or tuple(f"LABEL_{i}" for i in range(head.num_classes))
        is_dense, guessed_dense = head.sampling == "dense", head.num_classes != SOMETHING_CLASSES
        if c.num_frames > 1 and (
            is_dense != guessed_dense or (is_dense and head.stride != USUAL_STRIDE)
        ):
            remarks.append(
                f"classifier.sampling = {head.sampling}, stride = {head.stride}: {name} does not keep how frames are chosen"
            )
        config |= {
            "architectures": ["VideoMAEForVideoClassification"],
            "use_mean_pooling": head.pooling == "mean",
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    state, left = _named(model, hugging_face.videomae(version))
    inner = ("embeddings.", "encoder.", "layernorm.")
    return (
        {
            f"videomae.{name}" if name.startswith(inner) else name: tensor
            for name, tensor in state.items()
        },
        config,
        remarks + left,
    )


def _vit_mae(
    model: Model, version: Version
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    c, name = model.config, "Hugging Face's ViTMAE"
    if not isinstance(model, VideoMAE):
        raise ValueError(
            "format: transformers has no classifier of ViTMAE with a class token; hugging_face is for its pretrained models"
        )
    _require(
        model,
        name,
        {
            "class_tokens": 1,
            "decoder_class_token": "encoded",
            "layer_scale": 0.0,
            "num_frames": 1,
            "tubelet_size": 1,
            "encoder_norm": True,
            "predicted_frames": None,
            "width": c.height,
        },
    )
    if c.positions not in ("sincos", "learned"):
        raise ValueError(f"format: {name} has no positions = {c.positions}")
    remarks = _differences(model, name, "tubelet", "normalized", head_norm_eps=c.norm_eps)
    sizes = _sizes(c)
    config = {
        **sizes,
        "model_type": "vit_mae",
        "image_size": c.height,
        "architectures": ["ViTMAEForPreTraining"],
        "qkv_bias": c.qkv_bias != "none",
        "norm_pix_loss": model.objective_config.normalize == "tubelet",
    }
    own = dict(model.state_dict())
    if not c.decoder_embed_bias:
        own["decoder.encoder_to_decoder.bias"] = torch.zeros(c.decoder_embed_dim)
    if c.qkv_bias == "qv":
        for key in [key for key in own if key.endswith("qkv.q_bias")]:
            own[key.replace("q_bias", "k_bias")] = torch.zeros_like(own[key])
    tables = {}
    for side, key in (
        ("encoder", "vit.embeddings.position_embeddings"),
        ("decoder", "decoder.decoder_pos_embed"),
    ):
        positions = getattr(model, side).positions
        table_ND, class_row = positions(c.grid)
        row = class_row if isinstance(class_row, torch.Tensor) else torch.zeros(table_ND.shape[1])
        tables[key] = torch.cat([row[None], table_ND])[None].detach()
        for part in ("table", "class_row"):
            own.pop(f"{side}.positions.{part}", None)
    state, left = _named(model, hugging_face.vit_mae(version), own)
    return (
        {
            **{
                name if name.startswith("decoder.") else f"vit.{name}": tensor
                for name, tensor in state.items()
            },
            **tables,
        },
        config,
        remarks + left,
    )


def _sizes(c: ModelConfig) -> dict[str, Any]:
    """What the configurations of both classes have in common."""
    return {
        "dtype": "float32",
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": round(c.embed_dim * c.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": c.norm_eps,
        "image_size": c.height if c.height == c.width else [c.height, c.width],
        "patch_size": c.patch_size,
        "num_channels": c.in_channels,
        "decoder_hidden_size": c.decoder_embed_dim,
        "decoder_num_hidden_layers": c.decoder_depth,
        "decoder_num_attention_heads": c.decoder_num_heads,
        "decoder_intermediate_size": round(c.decoder_embed_dim * c.decoder_mlp_ratio),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }


def _named(
    model: Model, layout: Layout, state: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors by a project's names, remarks on those that it has no name for). Raises: ValueError
    where these matter.
    """
    c = model.config
    sizes = {
        "D": c.embed_dim,
        "H": round(c.embed_dim * c.mlp_ratio),
        "E": c.decoder_embed_dim,
        "C": c.in_channels,
        "t": c.tubelet_size,
        "G": round(c.decoder_embed_dim * c.decoder_mlp_ratio),
        "p": c.patch_size,
        "P": c.predicted_values,
    }
    if isinstance(model, VideoClassifier):
        sizes["K"] = model.classifier_config.num_classes
    own = {
        name: tensor.detach().float().cpu()
        for name, tensor in (state or model.state_dict()).items()
    }
    theirs, left = write(own, layout.rules, sizes)
    harmless = [name for name in left if name.endswith("k_bias") or name.startswith("objective.")]
    if len(harmless) < len(left):
        raise ValueError(
            f"format: there is no place for {next(name for name in left if name not in harmless)}"
        )
    return theirs, [f"{name}: left out, no output depends on it" for name in harmless]


def _require(model: Model, name: str, values: dict[str, Any]) -> None:
    """Raises: ValueError where the format would compute something else."""
    c = model.config
    for key, value in values.items():
        if getattr(c, key) != value:
            raise ValueError(f"format: {name} has no model.{key} = {getattr(c, key)}")
    if isinstance(model, VideoClassifier) and model.classifier_config.pooling == "rest":
        raise ValueError(f"format: {name} has no classifier.pooling = rest")
    if c.positions == "sinusoid" and c.position_grid not in (None, c.grid):
        raise ValueError(
            f"format: {name} has no positions interpolated from another grid (model.position_grid = {c.position_grid})"
        )


def _differences(model: Model, name: str, normalize: str, pixels: str, **values: Any) -> list[str]:
    """Remarks on settings that the format fixes at a value, or does not have."""
    c = model.config
    remarks = [
        f"model.{key} = {getattr(c, key)}: {name} computes with {value}"
        for key, value in values.items()
        if getattr(c, key) != value
    ]
    if c.drop_path:
        remarks.append(
            f"model.drop_path = {c.drop_path}: left out, it is a setting of the training"
        )
    if isinstance(model, VideoMAE):
        objective = model.objective_config
        if objective.contrastive_weight:
            remarks.append(
                f"objective.contrastive_weight = {objective.contrastive_weight}: left out, the loss of {name} is reconstruction"
            )
        if objective.normalize not in (normalize, "none"):
            remarks.append(
                f"objective.normalize = {objective.normalize}: {name} knows {normalize} or none"
            )
        if objective.pixels != pixels:
            remarks.append(f"objective.pixels = {objective.pixels}: {name} has them {pixels}")
    return remarks
