"""Structured cuts of the three parts of a transformer block, from second moments alone (MoDeGPT, arXiv 2408.09632).

    C (D, D)  second moment of what attention reads; C_s (F, F) of what the down projection reads
    MLP       keep the channels with the largest ridge leverage; the down projection is fitted anew   (Nystrom)
    queries, keys   keep the rotation pairs (i, i + hd/2) of a head with the largest |q|^2 |k|^2      (CR)
    values, outputs of a head   the rank-r product nearest to W_O W_V in the metric of C              (SVD)

Rotary embedding turns dimension i with i + hd/2, so they stay or go together, and those that stay keep their frequency.
"""

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, decompose, solve_symmetric, truncate
from spectrim.linalg.metric import Root, root_of


def with_bias_input(gram: Tensor, mean: Tensor) -> Tensor:
    """E[(x, 1) (x, 1)^T] (I + 1, I + 1) from E[x x^T] and E[x]."""
    one = torch.ones(1, 1, dtype=gram.dtype, device=gram.device)
    return torch.cat([torch.cat([gram, mean[:, None]], 1), torch.cat([mean[None], one], 1)])


def leverage(moments: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores (F,), diag(C (C + lambda 1)^-1) with lambda = `ridge` times the mean of C's diagonal."""
    damping = ridge * moments.diagonal().mean()
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return solve_symmetric(moments + damping * eye, moments).diagonal()


def nystrom_down(down: Tensor, moments: Tensor, kept: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """The down projection (O, K) for the channels `kept` (K,) that makes up best for those that go.

    min over W' of E|| W s - W' s_kept ||^2 + r || W' - W_kept ||^2 with r = `ridge` times the mean of their diagonal:
    the ridge pulls towards the weight as it was, so that keeping all channels changes nothing.
    """
    system = moments[kept][:, kept]
    damping = ridge * system.diagonal().mean() * torch.eye(len(kept), dtype=system.dtype, device=system.device)
    before = down[:, kept]
    missing = down @ moments[:, kept] - before @ system
    return before + solve_symmetric(system + damping, missing.mT).mT


def row_sizes(weight: Tensor, moments: Tensor) -> Tensor:
    """E[(W x)_i^2] (O,) from the second moment of x."""
    return ((weight @ moments) * weight).sum(1)


def pair_scores(queries: Tensor, keys: Tensor, head: int) -> Tensor:
    """What each rotation pair is worth (G, head/2) from sizes of queries (H head,) and keys (G head,); G divides H.

    (q_i + q_i') (k_i + k_i'), the bound on the pair's share of the squared attention logits at any distance of the two
    tokens; queries that share a key head are added up.
    """
    half = head // 2
    key = keys.view(-1, 2, half).sum(1)
    query = queries.view(len(key), -1, 2, half).sum((1, 2))
    return query * key


def best_pairs(scores: Tensor, count: int) -> Tensor:
    """Which dimensions stay (G, head) bool: `count` pairs in each head."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(1, scores.argsort(dim=1, descending=True, stable=True)[:, :count], True)
    return torch.cat([kept, kept], 1)


def value_output(value: Tensor, outputs: Tensor, rank: int, *, moments: Root) -> Factors:
    """`rank` dimensions in the place of a head's: values (rank, I) on the right, and what a reader of the old ones is
    multiplied by, (head, rank), on the left.

    `value` (head, I) is read through `outputs` (N, head), those of all query heads that share it, one under the other:
    min || outputs (value - left right) R ||_F, R R^T = C. With one query head this is the optimum of W_O W_V.
    """
    return truncate(decompose(value, left=root_of(outputs.mT @ outputs), right=moments), rank)


def largest_values(value: Tensor, outputs: Tensor, rank: int) -> Factors:
    """The `rank` dimensions of a head with the largest weights, as `value_output` gives them: magnitude pruning."""
    size = value.square().sum(1) + outputs.square().sum(0)
    kept = size.argsort(descending=True, stable=True)[:rank].sort().values
    return Factors(torch.eye(len(value), dtype=value.dtype, device=value.device)[:, kept], value[kept])


def channel_sizes(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared size (F,) of all weights of each channel of an MLP: magnitude pruning."""
    return gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)


def sparsities(influence: Tensor, mean: float, temperature: float, *, most: float = 0.8) -> Tensor:
    """What share of each block goes (L,), from its influence: the softmax of -influence / temperature, of mean `mean`.

    Maximises sum_l -influence_l phi_l + temperature H(phi), the paper's objective. No block loses more than `most`
    (or `mean`, where that is more); what is above is shared among the others in the same proportions.
    """
    share = torch.softmax(-influence / temperature, 0)
    most, total = max(most, mean), mean * len(share)
    full = torch.zeros_like(share, dtype=torch.bool)
    for _ in range(len(share)):
        free = share.masked_fill(full, 0.0)
        left = total - most * int(full.sum())
        found = torch.where(full, most, free / free.sum() * left)
        over = found > most
        if not bool((over & ~full).any()):
            return found
        full |= over
    return torch.full_like(share, most)  # only where the mean is the most
