"""The contrastive loss: each query finds its target among the batch's targets.

Knows embeddings, groups and, where training is distributed, the other ranks' targets.
Does not know heads, backbones or the optimizer.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def info_nce(
    queries: Float[Tensor, "queries dim"],
    targets: Float[Tensor, "targets dim"],
    answers: Int[Tensor, " queries"],
    query_groups: Int[Tensor, " queries"] | None = None,
    target_groups: Int[Tensor, " targets"] | None = None,
    scale: float = 100.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding each query's answer among all targets (InfoNCE).

    Source: van den Oord et al., arXiv 1807.03748, equation 4; the scale of 100 is CLIP's
    and the reference's.

    Args:
        queries: Query embeddings of unit length.
        targets: Target embeddings; of unit length but for the reference's training sum.
        answers: Position of each query's own target among `targets`.
        query_groups: Group of each query's target; a target of the same group that is not
            the answer is left out of the query's negatives. None leaves nothing out.
        target_groups: Group of each target; given together with `query_groups` or not at all.
        scale: What cosines are multiplied with.

    Returns:
        The mean over queries, in nats, at least 0.

    Raises:
        ValueError: Where the groups of one side alone are given.
    """
    if (query_groups is None) != (target_groups is None):
        raise ValueError("groups of one side alone cannot be compared; give both query_groups and target_groups")
    logits = scale * queries @ targets.T
    if query_groups is not None and target_groups is not None:
        same = query_groups[:, None] == target_groups[None, :]
        same[torch.arange(len(answers), device=answers.device), answers] = False
        logits = logits.masked_fill(same, float("-inf"))
    return F.cross_entropy(logits, answers)


class InfoNCE(nn.Module):
    """InfoNCE over the batch, with the negatives of all ranks where training is distributed.

    Args:
        scale: What cosines are multiplied with (100 in the reference).
        symmetric: Whether targets also look for their queries; the mean of both is taken.
        skip_duplicates: Whether targets of one group are kept from being each other's
            negatives. The reference does not.
    """

    def __init__(self, scale: float = 100.0, *, symmetric: bool = False, skip_duplicates: bool = True) -> None:
        super().__init__()
        self.scale, self.symmetric, self.skip_duplicates = scale, symmetric, skip_duplicates

    def forward(
        self,
        queries: Float[Tensor, "batch dim"],
        targets: Float[Tensor, "batch dim"],
        groups: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Return the loss of this rank's queries; row i of both sides belongs together."""
        all_targets, start = _gather(targets)
        all_groups, _ = _gather(groups)
        answers = torch.arange(start, start + len(queries), device=queries.device)
        mine, every = (groups, all_groups) if self.skip_duplicates else (None, None)
        loss = info_nce(queries, all_targets, answers, mine, every, self.scale)
        if self.symmetric:
            all_queries, _ = _gather(queries)
            loss = (loss + info_nce(targets, all_queries, answers, mine, every, self.scale)) / 2
        return loss


class _EveryRank(torch.autograd.Function):
    """Every rank's rows, one behind the other; a row's gradient is the sum of what all ranks say of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather; ranks hold equal counts."""
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum over ranks and keep this rank's rows."""
        whole = gradients[0].contiguous()
        torch.distributed.all_reduce(whole)
        begin = torch.distributed.get_rank() * ctx.count
        return whole[begin : begin + ctx.count]


def _gather(rows: Tensor) -> tuple[Tensor, int]:
    """Return every rank's rows, with gradient, and where this rank's begin. Ranks hold equal counts."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows, 0
    gathered: Tensor = _EveryRank.apply(rows)
    return gathered, torch.distributed.get_rank() * len(rows)
