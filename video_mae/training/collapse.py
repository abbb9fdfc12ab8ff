"""A teacher that follows its student can draw both to where all features are alike and easily
predicted: the watch for it.

Letters: B clips, N tokens of a grid, F features, S tokens that are looked at.
"""

from typing import Any

import torch

from video_mae.training.engine import Engine
from video_mae.training.feature_quality import effective_rank

LOW_LINES = 5  # logged in a row with a rank below the least, before a run stops
NUM_WATCHED = 512  # tokens of a micro-batch
STRIDE = 2654435761  # a prime: its multiples, modulo the number of tokens, are spread over these


class RankWatch:
    """Watches the effective rank of features, which is 1 where all tokens have the same.

    reason: why the run is to stop, or empty.
    """

    reason = ""

    def __init__(self, engine: Engine, min_rank: float) -> None:
        self.engine, self.min_rank = engine, min_rank

    def see(self, target_BNF: torch.Tensor) -> None:
        """Keeps some tokens of a micro-batch, at places that depend on the number of tokens
        alone.
        """
        tokens_MF = target_BNF.flatten(0, 1)
        num = len(tokens_MF)
        places_S = torch.arange(min(NUM_WATCHED, num), device=tokens_MF.device) * STRIDE % num
        self.tokens_SF = tokens_MF[places_S]

    def rank(self, step: int, memory: dict[str, Any]) -> float:
        """The rank of the tokens seen last, the mean over ranks of the run; every rank must call
        it. memory: of the run, keeps at which steps in a row it was low.
        """
        rank = float(self.engine.mean(effective_rank(self.tokens_SF)))
        low_steps = memory.setdefault("low_rank_steps", [])
        if rank < self.min_rank:
            low_steps.append(step)
        else:
            low_steps.clear()
        if len(low_steps) >= LOW_LINES:
            self.reason = (
                f"the features of the teacher have collapsed: their effective rank is {rank:.2f}, "
                f"and below objective.min_rank = {self.min_rank:g} since step {low_steps[0]}; "
                "begin a new run with a lower optim.base_lr, a longer warm-up, or "
                "objective.teacher_momentum nearer to 1"
            )
        return rank
