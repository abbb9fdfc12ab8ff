"""A second VideoMAE, written from the description of the official one and sharing nothing with `video_mae.model`.

It does what the official code does: a float clip normalised by ImageNet statistics, a Conv3d over all tokens, boolean masks,
state dict names of the official checkpoints. Slow and plain on purpose: it is what the real model is measured against.
Letters: B clips, C channels, T frames, H W pixels, N tokens, M masked and decoded, P values of a tubelet.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def official_name(name: str) -> str:
    """Our parameter name in the words of the official checkpoints."""
    for ours, official in ((".mlp.0.", ".mlp.fc1."), (".mlp.2.", ".mlp.fc2."), ("patch_embed.", "patch_embed.proj."),
                           ("qkv.q_bias", "q_bias"), ("qkv.v_bias", "v_bias"), ("decoder.encoder_to_decoder", "encoder_to_decoder"),
                           ("decoder.mask_token", "mask_token")):
        name = name.replace(ours, official)
    return name


def official_state(model: torch.nn.Module, tubelet_shape: tuple[int, int, int, int]) -> State:
    """Leaf copies of a model's parameters; tubelet_shape: (channels, frames, rows, columns) of the Conv3d kernel."""
    state = {official_name(name): parameter.detach().clone() for name, parameter in model.named_parameters()}
    key = "encoder.patch_embed.proj.weight"
    state[key] = state[key].reshape(-1, *tubelet_shape)
    return {name: tensor.requires_grad_() for name, tensor in state.items()}


def sinusoid_table(num_positions: int, width: int) -> torch.Tensor:
    """Entry (n, j) is sin or cos (even or odd j) of n / 10000^(2 floor(j / 2) / width); float32 values."""
    n, j = np.arange(num_positions, dtype=np.float64)[:, None], np.arange(width)[None, :]
    angle = n / np.power(10000.0, 2 * (j // 2) / width)
    return torch.from_numpy(np.where(j % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32))


def norm(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{prefix}.weight"] + state[f"{prefix}.bias"]


def attention(x: torch.Tensor, state: State, prefix: str, num_heads: int) -> torch.Tensor:
    batch, tokens, width = x.shape
    bias = torch.cat([state[f"{prefix}.q_bias"], torch.zeros(width, dtype=x.dtype), state[f"{prefix}.v_bias"]])
    qkv = (x @ state[f"{prefix}.qkv.weight"].T + bias).reshape(batch, tokens, 3, num_heads, width // num_heads)
    heads = []
    for head in range(num_heads):
        q, k, v = (qkv[:, :, which, head] for which in range(3))
        scores = (q * (width // num_heads) ** -0.5) @ k.transpose(1, 2)
        heads.append(torch.softmax(scores, dim=-1) @ v)
    return torch.cat(heads, dim=-1) @ state[f"{prefix}.proj.weight"].T + state[f"{prefix}.proj.bias"]


def mlp(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    hidden = x @ state[f"{prefix}.fc1.weight"].T + state[f"{prefix}.fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ state[f"{prefix}.fc2.weight"].T + state[f"{prefix}.fc2.bias"]


def blocks(x: torch.Tensor, state: State, prefix: str, depth: int, num_heads: int) -> torch.Tensor:
    for i in range(depth):
        x = x + attention(norm(x, state, f"{prefix}.{i}.norm1"), state, f"{prefix}.{i}.attn", num_heads)
        x = x + mlp(norm(x, state, f"{prefix}.{i}.norm2"), state, f"{prefix}.{i}.mlp")
    return x


def embed(video_BCTHW: torch.Tensor, state: State) -> torch.Tensor:
    """All tokens of a normalised video, with positions."""
    weight = state["encoder.patch_embed.proj.weight"]
    x = F.conv3d(video_BCTHW, weight, state["encoder.patch_embed.proj.bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return x + sinusoid_table(x.shape[1], x.shape[2]).to(x.dtype)


def pretraining_forward(video_BCTHW: torch.Tensor, state: State, hidden_BN: torch.Tensor, decoded_BN: torch.Tensor, depths: tuple[int, int],
                        heads: tuple[int, int]) -> torch.Tensor:
    """Predictions [B, M, P] of the tokens that are hidden from the encoder and decoded."""
    x = embed(video_BCTHW, state)
    batch, tokens, width = x.shape
    x = x[~hidden_BN].reshape(batch, -1, width)
    x = norm(blocks(x, state, "encoder.blocks", depths[0], heads[0]), state, "encoder.norm")
    x = x @ state["encoder_to_decoder.weight"].T
    positions = sinusoid_table(tokens, x.shape[2]).to(x.dtype).expand(batch, -1, -1)
    visible = x + positions[~hidden_BN].reshape(batch, -1, x.shape[2])
    masked = state["mask_token"].reshape(1, 1, -1) + positions[hidden_BN & decoded_BN].reshape(batch, -1, x.shape[2])
    x = blocks(torch.cat([visible, masked], dim=1), state, "decoder.blocks", depths[1], heads[1])
    return norm(x[:, -masked.shape[1]:], state, "decoder.norm") @ state["decoder.head.weight"].T + state["decoder.head.bias"]


def targets(video_BCTHW: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], tubelet: tuple[int, int, int],
            hidden_BN: torch.Tensor, normalize: str) -> torch.Tensor:
    """Targets [B, M, P] in float64: un-normalise, cut into tubelets with loops, normalise each."""
    mean_C, std_C = (torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1) for values in (mean, std))
    pixels = video_BCTHW.double() * std_C + mean_C
    (t, p, q), (_, channels, frames, height, width) = tubelet, pixels.shape
    tokens = [pixels[:, :, i:i + t, j:j + p, k:k + q].permute(0, 2, 3, 4, 1).reshape(len(pixels), -1, channels)
              for i in range(0, frames, t) for j in range(0, height, p) for k in range(0, width, q)]
    x = torch.stack(tokens, dim=1)  # batch, tokens, pixels of a tubelet, channels
    if normalize == "channel":
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    elif normalize == "tubelet":
        flat = x.flatten(2)
        x = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, unbiased=True, keepdim=True) + 1e-6).sqrt()
    return x.flatten(2)[hidden_BN].reshape(len(pixels), -1, math.prod(tubelet) * channels)


def contrastive(predicted_BMP: torch.Tensor, target_BMP: torch.Tensor, temperature: float | torch.Tensor, negatives: str) -> torch.Tensor:
    """The definition, term by term: -log of the share of the own target among all that compete."""
    groups = [predicted_BMP.flatten(0, 1)], [target_BMP.flatten(0, 1)]
    if negatives == "clip":
        groups = list(predicted_BMP), list(target_BMP)
    terms = []
    for predicted, target in zip(*groups, strict=True):
        for i, x in enumerate(predicted):
            similarity = torch.stack([torch.dot(x, y) / (torch.linalg.norm(x) * torch.linalg.norm(y)) for y in target])
            weights = torch.exp(similarity / temperature)
            terms.append(-torch.log(weights[i] / weights.sum()))
    return torch.stack(terms).mean()
