"""Models of ours as others read them: the official file, Hugging Face folders, a program of
torch.export.

What a format cannot hold is refused where the outputs would be others, and told where they stay the
same.
"""

import copy
from pathlib import Path

import torch

from video_mae.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from video_mae.convert.facts import SOMETHING_CLASSES, USUAL_STRIDE, Options, Tensors
from video_mae.convert.hugging_face import HEAD_NORM_EPS, VIDEOMAE, VITMAE, sizes
from video_mae.convert.model_folder import Model, write_weights
from video_mae.convert.official import OFFICIAL
from video_mae.convert.project import Project
from video_mae.extras import require_package
from video_mae.files import write_whole
from video_mae.model.blocks import Attention
from video_mae.model.vit import Encoder, VideoClassifier, VideoMAE

PLAIN = {
    "class_tokens": 0,
    "decoder_embed_bias": False,
    "predicted_frames": None,
    "target_width": None,
}


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
            "format: the official VideoMAE has learned positions in its classifiers alone "
            "(use_learnable_pos_emb); those of its decoder are always computed"
        )
    required = dict(PLAIN)
    if not is_classifier:
        required["encoder_norm"] = True
    # any others are written as if they were learned
    has_table = has_learned or (is_classifier and is_interpolated(c))
    if not has_table:
        required["positions"] = "sinusoid"
    fixed = {"norm_eps": 1e-6, "head_norm_eps": 1e-6, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    own = dict(model.state_dict())
    own.pop("encoder.positions.table", None)
    state, remarks = _named(model, own, OFFICIAL, required, fixed)
    if has_table:
        table_ND = model.encoder.positions(c.grid)[0]
        state["encoder.pos_embed"] = table_ND[None].detach().float().cpu()
        remarks.append(
            "pos_embed: is read by the official class where it is made with "
            "use_learnable_pos_emb=True"
        )
    if c.tubelet_size == c.num_frames == 1:
        remarks.append(
            "patch_embed.proj.weight: is that of a Conv2d, which MAE-pytorch loads; VideoMAE's own "
            "class has a Conv3d"
        )
    arguments: Options = {
        "num_frames": c.num_frames,
        "height": c.height,
        "width": c.width,
        "num_heads": c.num_heads,
    }
    if isinstance(model, VideoClassifier):
        state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
        head = model.classifier_config
        arguments |= {"sparse_sample": head.sampling != "dense", "sampling_rate": head.stride}
    else:
        arguments |= {
            "decoder_num_heads": c.decoder_num_heads,
            "normlize_target": model.objective_config.normalize == "channel",
            "decoder_context": c.decoder_context,
        }
    content = {"model": state, "args": arguments}
    write_whole(Path(path), lambda building: torch.save(content, building))
    return remarks


def export_hugging_face(model: Model, folder: str | Path) -> list[str]:
    """Writes a folder that from_pretrained of transformers opens as VideoMAE, or as ViTMAE where
    the model has a class token.

    Returns: remarks on what the folder does not say. Raises: ValueError for a model that these
    classes have no place for.
    """
    c = model.config
    is_image = bool(c.class_tokens)
    state, config, remarks = _vit_mae(model) if is_image else _videomae(model)
    config |= {
        "dtype": "float32",
        **sizes(vars(c)),
        "num_attention_heads": c.num_heads,
        "decoder_num_attention_heads": c.decoder_num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": c.norm_eps,
        "image_size": c.height if c.height == c.width else [c.height, c.width],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }
    size = {"height": c.height, "width": c.width}
    preprocessor: Options = {
        "image_processor_type": "ViTImageProcessor" if is_image else "VideoMAEImageProcessor",
        "do_resize": True,
        "size": size if is_image else {"shortest_edge": min(c.height, c.width)},
        "do_center_crop": not is_image,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    for name, values in (("image_mean", c.mean), ("image_std", c.std)):
        preprocessor[name] = list(values) * (c.in_channels // len(values))  # one a channel
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    write_weights(folder, state, files)
    return remarks


def is_interpolated(c: ModelConfig) -> bool:
    """Whether positions of VideoMAE are not those that its code computes for the grid."""
    kind = c.positions, c.resize_positions
    return kind == ("sinusoid", "interpolate") and c.position_grid not in (None, c.grid)


def export_program(model: Model, path: str | Path) -> list[str]:
    """Writes a classifier as a program of torch.export (.pt2): uint8 clips [B, T, H, W, C] of any
    number in, logits [B, K] out.

    It needs PyTorch alone to run. Raises: ValueError for a model without a head.
    """
    program = _program(model)
    write_whole(Path(path), lambda building: torch.export.save(program, building))
    return []


def export_onnx(model: Model, path: str | Path) -> list[str]:
    """Writes a classifier as ONNX: `clip`, uint8 [B, T, H, W, C] of any number, in, `logits` [B, K]
    out. Raises: ValueError for a model without a head, or larger than the 2 GB that a file takes.
    """
    require_package("onnxscript", "format")
    program = _program(model)

    def write(building: Path) -> None:
        torch.onnx.export(
            program,
            f=building,
            external_data=False,
            dynamo=True,
            verbose=False,
            input_names=["clip"],
            output_names=["logits"],
        )

    write_whole(Path(path), write)
    return []


def _program(model: Model) -> torch.export.ExportedProgram:
    if not isinstance(model, VideoClassifier):
        raise ValueError(
            "format: torch_export and onnx are for classifiers, and this model is a VideoMAE; "
            "fine-tune it first"
        )
    c, portable = model.config, copy.deepcopy(model).cpu().eval()
    for module in portable.modules():
        if isinstance(module, Attention):
            module.impl = "sdpa"
        elif isinstance(module, Encoder):
            module.impl = "reference"
    clip_BTHWC = torch.zeros(2, c.num_frames, c.height, c.width, c.in_channels, dtype=torch.uint8)
    return torch.export.export(
        portable, (clip_BTHWC,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )


def _videomae(model: Model) -> tuple[Tensors, Options, list[str]]:
    c, name = model.config, VIDEOMAE.name
    required = {**PLAIN, "positions": "sinusoid", "layer_scale": 0.0}
    fixed = {"head_norm_eps": HEAD_NORM_EPS}
    state, remarks = _named(model, model.state_dict(), VIDEOMAE, required, fixed)
    config: Options = {
        "model_type": "videomae",
        "num_frames": c.num_frames,
        "tubelet_size": c.tubelet_size,
        "qv_bias": c.qkv_bias != "none",
    }
    if isinstance(model, VideoMAE):
        if c.in_channels == 3 and c.mean != IMAGENET_MEAN:
            remarks.append(
                f"targets: {name} computes them as if the input were normalised by ImageNet's mean "
                "and std"
            )
        config |= {
            "architectures": ["VideoMAEForPreTraining"],
            "use_mean_pooling": not c.encoder_norm,
            "norm_pix_loss": model.objective_config.normalize == "channel",
        }
    else:
        head = model.classifier_config
        names = head.class_names or tuple(f"LABEL_{i}" for i in range(head.num_classes or 0))
        usual = "uniform" if head.num_classes == SOMETHING_CLASSES else "dense"
        sampling = "dense" if head.sampling == "dense" else "uniform"
        is_usual = sampling == usual and (usual == "uniform" or head.stride == USUAL_STRIDE)
        if c.num_frames > 1 and not is_usual:
            remarks.append(
                f"classifier.sampling = {head.sampling}, stride = {head.stride}: {name} does not "
                "keep how frames are chosen"
            )
        config |= {
            "architectures": ["VideoMAEForVideoClassification"],
            "use_mean_pooling": head.pooling == "mean",
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    return state, config, remarks


def _vit_mae(model: Model) -> tuple[Tensors, Options, list[str]]:
    c = model.config
    if not isinstance(model, VideoMAE):
        raise ValueError(
            "format: transformers has no classifier of ViTMAE with a class token; hugging_face is "
            "for its pretrained models"
        )
    required = {
        "class_tokens": 1,
        "decoder_class_token": "encoded",
        "layer_scale": 0.0,
        "num_frames": 1,
        "tubelet_size": 1,
        "encoder_norm": True,
        "predicted_frames": None,
        "target_width": None,
        "width": c.height,
    }
    if c.positions != "learned":
        required["positions"] = "sincos"
    config = {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "qkv_bias": c.qkv_bias != "none",
        "norm_pix_loss": model.objective_config.normalize == "tubelet",
    }
    own = {key: tensor for key, tensor in model.state_dict().items() if ".positions." not in key}
    own.setdefault("decoder.encoder_to_decoder.bias", torch.zeros(c.decoder_embed_dim))
    for key in list(own):
        if key.endswith("qkv.q_bias"):
            own.setdefault(key.replace("q_bias", "k_bias"), torch.zeros_like(own[key]))
    fixed = {"head_norm_eps": c.norm_eps}
    state, remarks = _named(model, own, VITMAE, required, fixed)
    for key, side in zip(VITMAE.positions.values(), (model.encoder, model.decoder), strict=True):
        table_ND, class_row_D = side.positions(c.grid)
        if not isinstance(class_row_D, torch.Tensor):
            class_row_D = torch.zeros(table_ND.shape[1])
        state[key] = torch.cat([class_row_D[None], table_ND])[None]
    return state, config, remarks


def _named(
    model: Model, own: Tensors, project: Project, required: Options, fixed: Options
) -> tuple[Tensors, list[str]]:
    """(tensors by a project's names, remarks on what its format does not hold). Raises: ValueError
    where that matters.
    """
    remarks = _checked(model, project, required, fixed)
    c = model.config
    patch = [c.in_channels, c.tubelet_size, c.patch_size, c.patch_size]
    if project is not VIDEOMAE and c.tubelet_size == c.num_frames == 1:  # of a Conv2d
        patch.pop(1)
    theirs: Tensors = {}
    for name, tensor in own.items():
        values = tensor.detach().float().cpu()
        if name == "encoder.patch_embed.weight":
            values = values.reshape(-1, *patch)
        elif name.endswith("_token"):
            values = values.reshape(1, 1, -1)
        parts = {name: values}
        if name.endswith("qkv.weight") and project.to_theirs(name) is None:
            apart = [name.replace("weight", f"{letter}_weight") for letter in "qkv"]
            parts = dict(zip(apart, values.chunk(3), strict=True))
        for part, values in parts.items():
            their_name = project.to_theirs(part)
            if their_name is not None:
                theirs[their_name] = values.contiguous()
            elif part.endswith("k_bias") or part.startswith("objective."):
                remarks.append(f"{part}: left out, no output depends on it")
            else:
                raise ValueError(f"format: there is no place for {part}")
    return theirs, remarks


def _checked(model: Model, project: Project, required: Options, fixed: Options) -> list[str]:
    """Remarks on settings that a format fixes at a value, or does not have. Raises: ValueError
    where it would compute something else than what is required.
    """
    c, name = model.config, project.name
    for key, value in required.items():
        if getattr(c, key) != value:
            raise ValueError(f"format: {name} has no model.{key} = {getattr(c, key)}")
    if isinstance(model, VideoClassifier) and model.classifier_config.pooling == "rest":
        raise ValueError(f"format: {name} has no classifier.pooling = rest")
    if "positions" in required and is_interpolated(c):
        raise ValueError(
            f"format: {name} has no positions interpolated from another grid (model.position_grid "
            f"= {c.position_grid}); those of model.resize_positions = compute it has"
        )
    remarks = []
    for key, value in fixed.items():
        if getattr(c, key) != value:
            remarks.append(f"model.{key} = {getattr(c, key)}: {name} computes with {value}")
    if c.drop_path:
        remarks.append(
            f"model.drop_path = {c.drop_path}: left out, it is a setting of the training"
        )
    if isinstance(model, VideoMAE):
        objective, pixels = model.objective_config, project.pixels(c.in_channels)
        if objective.contrastive_weight:
            remarks.append(
                f"objective.contrastive_weight = {objective.contrastive_weight}: left out, the "
                f"loss of {name} is reconstruction"
            )
        if objective.normalize not in (project.normalize, "none"):
            remarks.append(
                f"objective.normalize = {objective.normalize}: {name} knows {project.normalize} "
                "or none"
            )
        if objective.pixels != pixels:
            remarks.append(f"objective.pixels = {objective.pixels}: {name} has them {pixels}")
    return remarks
