"""A second VideoMAE, image MAE and mae_st, written from the description of the official ones and
sharing nothing with `video_mae.model.vit`.

They do what the official code does: a float clip normalised by channel statistics, a Conv3d (or
Conv2d) over all tokens, boolean masks, state dict names of the official checkpoints. Slow and plain
on purpose: it is what the real model is measured against.
Letters: B clips, C channels, T frames, H W pixels, N tokens, M masked and decoded, P values of a
tubelet.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def official_name(name: str) -> str:
    """Our parameter name in the words of the official checkpoints."""
    for ours, official in (
        (".mlp.0.", ".mlp.fc1."),
        (".mlp.2.", ".mlp.fc2."),
        ("patch_embed.", "patch_embed.proj."),
        ("qkv.q_bias", "q_bias"),
        ("qkv.v_bias", "v_bias"),
        ("decoder.encoder_to_decoder", "encoder_to_decoder"),
        ("decoder.mask_token", "mask_token"),
    ):
        name = name.replace(ours, official)
    return name


def official_state(model: torch.nn.Module, tubelet_shape: tuple[int, int, int, int]) -> State:
    """Leaf copies of a model's parameters; tubelet_shape: (channels, frames, rows, columns) of the
    Conv3d kernel.
    """
    state = {
        official_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }
    key = "encoder.patch_embed.proj.weight"
    state[key] = state[key].reshape(-1, *tubelet_shape)
    return {name: tensor.requires_grad_() for name, tensor in state.items()}


def sinusoid_table(num_positions: int, width: int) -> torch.Tensor:
    """Entry (n, j) is sin or cos (even or odd j) of n / 10000^(2 floor(j / 2) / width); float32
    values.
    """
    n, j = np.arange(num_positions, dtype=np.float64)[:, None], np.arange(width)[None, :]
    angle = n / np.power(10000.0, 2 * (j // 2) / width)
    return torch.from_numpy(np.where(j % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32))


def place_table(grid: tuple[int, int, int], width: int) -> torch.Tensor:
    """Rows in raster order: sin and cos of the column, sin and cos of the row (a quarter each),
    plus the time's minus those of time 0.
    """

    def waves(position: int, width: int) -> np.ndarray:
        angle = position * np.power(
            10000.0, -np.arange(width // 2, dtype=np.float64) / (width // 2)
        )
        return np.concatenate([np.sin(angle), np.cos(angle)])

    rows = [
        np.concatenate([waves(column, width // 2), waves(row, width // 2)])
        + waves(time, width)
        - waves(0, width)
        for time in range(grid[0])
        for row in range(grid[1])
        for column in range(grid[2])
    ]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def norm(x: torch.Tensor, state: State, prefix: str, eps: float = 1e-6) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{prefix}.weight"]
        + state[f"{prefix}.bias"]
    )


def projections(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    """Queries, keys and values, one behind the other, of any of the official layouts."""
    if f"{prefix}.q.weight" in state:  # mae_st
        return torch.cat(
            [
                x @ state[f"{prefix}.{letter}.weight"].T + state[f"{prefix}.{letter}.bias"]
                for letter in "qkv"
            ],
            dim=-1,
        )
    product = x @ state[f"{prefix}.qkv.weight"].T
    if f"{prefix}.qkv.bias" in state:  # MAE
        return product + state[f"{prefix}.qkv.bias"]
    if f"{prefix}.q_bias" in state:  # VideoMAE
        return product + torch.cat(
            [state[f"{prefix}.q_bias"], torch.zeros_like(x[0, 0]), state[f"{prefix}.v_bias"]]
        )
    return product


def attention(x: torch.Tensor, state: State, prefix: str, num_heads: int) -> torch.Tensor:
    batch, tokens, width = x.shape
    qkv = projections(x, state, prefix).reshape(batch, tokens, 3, num_heads, width // num_heads)
    heads = []
    for head in range(num_heads):
        q, k, v = (qkv[:, :, which, head] for which in range(3))
        scores = (q * (width // num_heads) ** -0.5) @ k.transpose(1, 2)
        heads.append(torch.softmax(scores, dim=-1) @ v)
    return (
        torch.cat(heads, dim=-1) @ state[f"{prefix}.proj.weight"].T + state[f"{prefix}.proj.bias"]
    )


def mlp(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    hidden = x @ state[f"{prefix}.fc1.weight"].T + state[f"{prefix}.fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ state[f"{prefix}.fc2.weight"].T + state[f"{prefix}.fc2.bias"]


def blocks(
    x: torch.Tensor, state: State, prefix: str, depth: int, num_heads: int, eps: float = 1e-6
) -> torch.Tensor:
    for i in range(depth):
        gamma_1, gamma_2 = (
            state.get(f"{prefix}.{i}.{name}", 1.0) for name in ("gamma_1", "gamma_2")
        )
        x = x + gamma_1 * attention(
            norm(x, state, f"{prefix}.{i}.norm1", eps), state, f"{prefix}.{i}.attn", num_heads
        )
        x = x + gamma_2 * mlp(
            norm(x, state, f"{prefix}.{i}.norm2", eps), state, f"{prefix}.{i}.mlp"
        )
    return x


def embed(video_BCTHW: torch.Tensor, state: State) -> torch.Tensor:
    """All tokens of a normalised video, with positions."""
    weight = state["encoder.patch_embed.proj.weight"]
    x = (
        F.conv3d(
            video_BCTHW, weight, state["encoder.patch_embed.proj.bias"], stride=weight.shape[2:]
        )
        .flatten(2)
        .transpose(1, 2)
    )
    return x + sinusoid_table(x.shape[1], x.shape[2]).to(x.dtype)


def pretraining_forward(
    video_BCTHW: torch.Tensor,
    state: State,
    hidden_BN: torch.Tensor,
    decoded_BN: torch.Tensor,
    depths: tuple[int, int],
    heads: tuple[int, int],
    eps: tuple[float, float] = (1e-6, 1e-6),
) -> torch.Tensor:
    """Predictions [B, M, P] of the tokens that are hidden from the encoder and decoded; eps: of all
    norms but the last, of the last.
    """
    x = embed(video_BCTHW, state)
    batch, tokens, width = x.shape
    x = x[~hidden_BN].reshape(batch, -1, width)
    x = norm(
        blocks(x, state, "encoder.blocks", depths[0], heads[0], eps[0]),
        state,
        "encoder.norm",
        eps[0],
    )
    x = x @ state["encoder_to_decoder.weight"].T
    positions = sinusoid_table(tokens, x.shape[2]).to(x.dtype).expand(batch, -1, -1)
    visible = x + positions[~hidden_BN].reshape(batch, -1, x.shape[2])
    masked = state["mask_token"].reshape(1, 1, -1) + positions[hidden_BN & decoded_BN].reshape(
        batch, -1, x.shape[2]
    )
    x = blocks(
        torch.cat([visible, masked], dim=1), state, "decoder.blocks", depths[1], heads[1], eps[0]
    )
    return (
        norm(x[:, -masked.shape[1] :], state, "decoder.norm", eps[1])
        @ state["decoder.head.weight"].T
        + state["decoder.head.bias"]
    )


def dual_forward(
    video_BCTHW: torch.Tensor,
    state: State,
    hidden_BN: torch.Tensor,
    decoded_BN: torch.Tensor,
    depths: tuple[int, int],
    heads: tuple[int, int],
) -> torch.Tensor:
    """Predictions of VideoMAE V2 for all tokens that its decoder mask chooses, in raster order,
    whether the encoder sees them or not.
    """
    x = embed(video_BCTHW, state)
    x = x[~hidden_BN].reshape(len(x), -1, x.shape[2])
    x = (
        norm(blocks(x, state, "encoder.blocks", depths[0], heads[0]), state, "encoder.norm")
        @ state["encoder_to_decoder.weight"].T
    )
    positions = sinusoid_table(hidden_BN.shape[1], x.shape[2]).to(x.dtype).expand(len(x), -1, -1)
    visible = x + positions[~hidden_BN].reshape(x.shape)
    chosen = state["mask_token"].reshape(1, 1, -1) + positions[decoded_BN].reshape(
        len(x), -1, x.shape[2]
    )
    x = blocks(torch.cat([visible, chosen], dim=1), state, "decoder.blocks", depths[1], heads[1])
    return (
        norm(x[:, -chosen.shape[1] :], state, "decoder.norm") @ state["decoder.head.weight"].T
        + state["decoder.head.bias"]
    )


def targets(
    video_BCTHW: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tubelet: tuple[int, int, int],
    hidden_BN: torch.Tensor,
    normalize: str,
) -> torch.Tensor:
    """Targets [B, M, P] in float64: un-normalise, cut into tubelets with loops, normalise each."""
    mean_C, std_C = (
        torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1) for values in (mean, std)
    )
    pixels = video_BCTHW.double() * std_C + mean_C
    (t, p, q), (_, channels, frames, height, width) = tubelet, pixels.shape
    tokens = [
        pixels[:, :, i : i + t, j : j + p, k : k + q]
        .permute(0, 2, 3, 4, 1)
        .reshape(len(pixels), -1, channels)
        for i in range(0, frames, t)
        for j in range(0, height, p)
        for k in range(0, width, q)
    ]
    x = torch.stack(tokens, dim=1)  # batch, tokens, pixels of a tubelet, channels
    if normalize == "channel":
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    elif normalize == "tubelet":
        flat = x.flatten(2)
        x = (flat - flat.mean(2, keepdim=True)) / (
            flat.var(2, unbiased=True, keepdim=True) + 1e-6
        ).sqrt()
    return x.flatten(2)[hidden_BN].reshape(len(pixels), -1, math.prod(tubelet) * channels)


def contrastive(
    predicted_BMP: torch.Tensor,
    target_BMP: torch.Tensor,
    temperature: float | torch.Tensor,
    negatives: str,
) -> torch.Tensor:
    """The definition, term by term: -log of the share of the own target among all that compete, in
    the mean of a clip, then of clips.

    Flat targets have no term; as rivals they resemble nothing.
    """
    groups = [predicted_BMP.flatten(0, 1)], [target_BMP.flatten(0, 1)]
    if negatives == "clip":
        groups = list(predicted_BMP), list(target_BMP)
    means = []
    for predicted, target in zip(*groups, strict=True):
        terms = []
        for i, x in enumerate(predicted):
            similarity = [
                torch.dot(x, y) / (torch.linalg.norm(x) * torch.linalg.norm(y))
                if y.any()
                else 0 * x[0]
                for y in target
            ]
            weights = torch.exp(torch.stack(similarity) / temperature)
            if target[i].any():
                terms.append(-torch.log(weights[i] / weights.sum()))
        means.append(torch.stack(terms).mean() if terms else 0 * predicted.sum())
    return torch.stack(means).mean()


MAE_NAMES = (
    ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."),
    ("patch_embed.", "patch_embed.proj."),
    ("class_token", "cls_token"),
    ("decoder_encoder_to_decoder.", "decoder_embed."),
    ("decoder_mask_token", "mask_token"),
    ("decoder_head.", "decoder_pred."),
    ("positions.space", "pos_embed_spatial"),
    ("positions.time", "pos_embed_temporal"),
    ("positions.class_row", "pos_embed_class"),
)


def mae_state(ours: State, kernel: tuple[int, ...], *, separate_linears: bool) -> State:
    """Our parameters by the names of facebookresearch/mae, or mae_st (separate_linears);
    differentiable in ours.

    kernel: (channels, rows, columns) of the Conv2d, or (channels, frames, rows, columns) of the
    Conv3d.
    """
    ours, theirs = dict(ours), {}
    for prefix in [name.removesuffix("qkv.weight") for name in ours if name.endswith("qkv.weight")]:
        weight, biases = (
            ours.pop(f"{prefix}qkv.weight"),
            [ours.pop(f"{prefix}qkv.{letter}_bias") for letter in "qkv"],
        )
        if separate_linears:
            for letter, part, bias in zip("qkv", weight.chunk(3), biases, strict=True):
                ours.update({f"{prefix}{letter}.weight": part, f"{prefix}{letter}.bias": bias})
        else:
            ours.update({f"{prefix}qkv.weight": weight, f"{prefix}qkv.bias": torch.cat(biases)})
    for side in ("encoder", "decoder"):
        if f"{side}.positions.table" in ours:
            rows = (
                [ours.pop(f"{side}.positions.class_row")[None]]
                if f"{side}.positions.class_row" in ours
                else []
            )
            ours[f"{side}.pos_embed"] = torch.cat([*rows, ours.pop(f"{side}.positions.table")])
    for name, tensor in ours.items():
        name = name.removeprefix("encoder.").replace("decoder.", "decoder_", 1)
        for word, official in MAE_NAMES:
            name = name.replace(word, official)
        theirs[name] = (
            tensor.reshape(-1, *kernel)
            if name == "patch_embed.proj.weight"
            else tensor.reshape(1, -1, tensor.shape[-1])
            if "token" in name or "pos_embed" in name
            else tensor
        )
    return theirs


def mae_positions(state: State, under: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(the class token's row or None, the table [N, D]) of the encoder (under = "") or the decoder
    ("decoder_").
    """
    has_class = "cls_token" in state
    if f"{under}pos_embed" in state:
        table = state[f"{under}pos_embed"][0]
        return (table[0], table[1:]) if has_class else (None, table)
    space, time = state[f"{under}pos_embed_spatial"][0], state[f"{under}pos_embed_temporal"][0]
    table = space.repeat(len(time), 1) + time.repeat_interleave(len(space), dim=0)
    return (state[f"{under}pos_embed_class"][0, 0] if has_class else None), table


def mae_encode(
    video_BCTHW: torch.Tensor,
    state: State,
    hidden_BN: torch.Tensor,
    depth: int,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """Tokens before the last norm: the class token first where there is one, then what is not
    hidden, in raster order.
    """
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    if weight.ndim == 4:
        x = F.conv2d(video_BCTHW[:, :, 0], weight, bias, stride=weight.shape[2:])
    else:
        x = F.conv3d(video_BCTHW, weight, bias, stride=weight.shape[2:])
    class_row, table = mae_positions(state, "")
    x = x.flatten(2).transpose(1, 2) + table.to(x.dtype)
    x = x[~hidden_BN].reshape(len(x), -1, x.shape[2])
    if class_row is not None:
        x = torch.cat([(state["cls_token"] + class_row).expand(len(x), -1, -1), x], dim=1)
    return blocks(x, state, "blocks", depth, num_heads, eps)


def mae_forward(
    video_BCTHW: torch.Tensor,
    state: State,
    hidden_BN: torch.Tensor,
    depths: tuple[int, int],
    heads: tuple[int, int],
    eps: float = 1e-6,
) -> torch.Tensor:
    """Predictions [B, M, P] of the hidden tokens: the decoder sees all tokens in raster order,
    after a class token where there is one.
    """
    x = norm(
        mae_encode(video_BCTHW, state, hidden_BN, depths[0], heads[0], eps), state, "norm", eps
    )
    x = x @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
    class_row, table = mae_positions(state, "decoder_")
    first = 0 if class_row is None else 1
    every = state["mask_token"].repeat(*hidden_BN.shape, 1)
    every[~hidden_BN] = x[:, first:].flatten(0, 1)
    every = every + table.to(x.dtype)
    if class_row is not None:
        token = (
            state["decoder_cls_token"].expand(len(x), -1, -1)
            if "decoder_cls_token" in state
            else x[:, :1]
        )
        every = torch.cat([token + class_row, every], dim=1)
    every = norm(
        blocks(every, state, "decoder_blocks", depths[1], heads[1], eps), state, "decoder_norm", eps
    )
    predicted = (every @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[:, first:]
    return predicted[hidden_BN].reshape(len(x), -1, predicted.shape[2])


def mae_classify(
    video_BCTHW: torch.Tensor,
    state: State,
    num_tokens: int,
    depth: int,
    num_heads: int,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Logits: of the normed mean without the class token where there is an `fc_norm`, else of the
    first token after `norm`.

    mae_st leaves the first token out of its mean whether it is a class token or not.
    """
    x = mae_encode(
        video_BCTHW,
        state,
        torch.zeros(len(video_BCTHW), num_tokens, dtype=torch.bool),
        depth,
        num_heads,
        eps,
    )
    if "fc_norm.weight" in state:
        is_shorter = "cls_token" in state or "blocks.0.attn.q.weight" in state
        x = norm(x[:, 1 if is_shorter else 0 :].mean(1), state, "fc_norm", eps)
    else:
        x = norm(x, state, "norm", eps)[:, 0]
    return x @ state["head.weight"].T + state["head.bias"]
