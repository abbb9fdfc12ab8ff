"""A training step without numbers: what it computes, keeps and moves, in seconds and without
memory, on tensors that have a shape and a dtype alone.
"""

import re
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from video_mae.config import FinetuneConfig, PretrainConfig
from video_mae.training.finetune import make_classifier
from video_mae.training.pretrain import make_autoencoder
from video_mae.training.stages import ClipStage
from video_mae.training.teacher import DTYPES

SOME_CLIPS = 8
# operations whose time is that of their arithmetic
_COMPUTED = re.compile(r"mm\.|attention")


class Rehearsal:
    """The network of a configuration, and a step of it.

    A teacher counts as the student's encoder, which is right for objective.teacher = ema.
    """

    def __init__(self, config: PretrainConfig | FinetuneConfig, impl: str, again: bool) -> None:
        """impl: of the kernels, as on a CPU. The fused attention of auto keeps what a GPU's does,
        that of reference is made of operations whose FLOPs can be counted. again: with activation
        checkpointing.
        """
        engine = replace(config.engine, kernels=impl, activation_checkpointing=again)
        self.config = config = replace(config, engine=engine)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):  # where nothing is drawn
            if isinstance(config, FinetuneConfig):
                self.model: nn.Module = make_classifier(config)
            else:
                c = config.model
                if config.objective.target == "features":
                    c = replace(c, target_width=c.embed_dim)
                self.model = make_autoencoder(replace(config, model=c))
            self.model.to(DTYPES[engine.precision])
        with self._fake:
            self.model.to_empty(device="cpu")
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)  # not made anew in a step

    def gflops(self) -> dict[str, float]:
        """GFLOP of a clip, forward and backward: of the model's class and its parts, of `Encoder`
        (a teacher), of `attention` (softmax(q k^T) v) and `Global` (all). Exact for impl =
        reference.
        """
        with self._fake, FlopCounterMode(display=False) as counter:
            self._loss(1).backward()
        found = {"attention": 0.0}
        for path, counts in counter.get_flop_counts().items():
            *parents, name = path.split(".")
            if len(parents) < 2 and "Encoder" not in parents:
                found[name] = sum(counts.values()) / 1e9
            elif name == "attn":
                found["attention"] += counts[torch.ops.aten.bmm] / 1e9
        found.pop("head_dropout", None)  # to which the counter gives what comes before it, too
        return found

    def costs(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the forward and backward pass of a micro-batch, without weights, their gradients and
        clips: GB that the forward pass keeps; GB that are there at most; GB that operations other
        than matrix products and attention read and write; how many operations there are.

        Returns: (base, slope), so that those of n clips are base + n * slope.
        """
        found = []
        for num_clips in (1, SOME_CLIPS):
            with self._fake, _Watch() as watch:
                loss = self._loss(num_clips)
                kept = watch.live
                loss.backward()
            found.append([kept, watch.peak, watch.moved, 1e9 * watch.operations])
        one, some = np.array(found) / 1e9
        slope = (some - one) / (SOME_CLIPS - 1)
        return one - slope, slope

    def _loss(self, num_clips: int) -> Tensor:
        config, c, features = self.config, self.config.model, None
        shape = num_clips, c.num_frames, c.height, c.width, c.in_channels
        clip_BTHWC = torch.zeros(shape, dtype=torch.uint8)
        if isinstance(config, FinetuneConfig):
            return self.model(clip_BTHWC).logsumexp(1).mean()
        if config.objective.target == "features":
            with torch.no_grad():
                features = self.model.get_submodule("encoder")(clip_BTHWC)[:, c.class_tokens :]
        mask = ClipStage(config).mask(torch.arange(num_clips), config.mask.decoder_mask_ratio)
        return self.model(clip_BTHWC, mask, None, features).loss


class _Watch(TorchDispatchMode):
    """Sees every operation; live: bytes of what they have made and is still there."""

    live = peak = moved = operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = ([*filter(torch.is_tensor, tree_leaves(of))] for of in (args, result))
        if not written or func.is_view or "view" in str(func):
            return result
        self.operations += 1
        if not _COMPUTED.search(str(func)):
            self.moved += sum(tensor.nbytes for tensor in read + written)
        if not func._schema.is_mutable:
            for tensor in written:
                storage = tensor.untyped_storage()
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
