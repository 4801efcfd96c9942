"""Matrix product operators (tensor-train matrices): a weight as a chain of small tensors.

    W[(o1 .. oN), (i1 .. iN)] = sum over bonds  G_1[1, o1, i1, b1] G_2[b1, o2, i2, b2] .. G_N[b_{N-1}, oN, iN, 1]

1. O = o1 .. oN and I = i1 .. iN; the axes of W are put in the order (o1 i1), (o2 i2), ..
2. N - 1 singular value decompositions, from left to right, each cut to the bond dimension chi (Oseledets 2011)
3. the singular values of a bond are shared evenly by the two cores it joins, and all cores get the same norm

Each cut alone is optimal, all of them together within a factor sqrt(N - 1). Two sites are a sum of chi Kronecker
products.
Source of the use on language models: CompactifAI (arXiv 2401.14109).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.solver import svd

Order = Literal["from the left", "from the right", "by the weight"]


class Sites(NamedTuple):
    """How the outputs and the inputs of a weight are split, one factor of each a site."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]


def sites_of(outputs: int, inputs: int, count: int) -> Sites:
    """`count` sites whose sizes o_j i_j are near each other: the larger factors of one meet the smaller of the other.

    A number without divisors (a prime) gets factors of 1, and the chain is then little more than a matrix.
    """
    return Sites(balanced_factors(outputs, count), balanced_factors(inputs, count)[::-1])


def balanced_factors(number: int, count: int) -> tuple[int, ...]:
    """`count` factors of `number`, ascending: of all ways, the one with the least sum."""
    if count == 1:
        return (number,)
    best: tuple[int, ...] = ()
    for first in (d for d in range(1, round(number ** (1 / count)) + 1) if number % d == 0):
        found = tuple(sorted((first, *balanced_factors(number // first, count - 1))))
        if not best or sum(found) < sum(best):
            best = found
    return best


def bonds_of(sites: Sites, chi: int) -> tuple[int, ...]:
    """Dimensions of the N + 1 bonds, the outer two 1: chi, or less where the matrix that is cut has a lower rank."""
    sizes = [o * i for o, i in zip(*sites, strict=True)]
    inner = [min(chi, math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, len(sizes))]
    return (1, *inner, 1)


def core_shapes(sites: Sites, chi: int) -> list[tuple[int, int, int, int]]:
    """Shapes (b, o, i, b') of the cores."""
    bonds = bonds_of(sites, chi)
    return list(zip(bonds[:-1], *sites, bonds[1:], strict=True))


def mpo_numbers(sites: Sites, chi: int) -> int:
    """Numbers in all cores."""
    return sum(math.prod(shape) for shape in core_shapes(sites, chi))


def full_bond(sites: Sites) -> int:
    """The smallest chi that cuts nothing."""
    return max(bonds_of(sites, math.prod(sites.outputs) * math.prod(sites.inputs)))


def largest_bond(sites: Sites, numbers: int) -> int:
    """The largest useful chi whose cores hold at most `numbers`; 0 where not even 1 does."""
    low, high = 0, full_bond(sites)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mpo_numbers(sites, middle) <= numbers else (low, middle - 1)
    return low


def to_mpo(weight: Tensor, sites: Sites, chi: int) -> list[Tensor]:
    """Cores (b, o, i, b') of `weight` (O, I) at bond dimension `chi`; precision is that of `weight`: pass float64."""
    count = len(sites.outputs)
    paired = [axis for site in range(count) for axis in (site, count + site)]
    rest, cores, strengths = weight.reshape(*sites.outputs, *sites.inputs).permute(paired), [], []
    bonds = bonds_of(sites, chi)
    for site in range(count - 1):
        left, kept, right = svd(rest.reshape(bonds[site] * sites.outputs[site] * sites.inputs[site], -1))
        bond = bonds[site + 1]
        cores.append(left[:, :bond].reshape(bonds[site], sites.outputs[site], sites.inputs[site], bond))
        strengths.append(kept[:bond])
        rest = kept[:bond, None] * right[:bond]
    cores.append(rest.reshape(bonds[-2], sites.outputs[-1], sites.inputs[-1], 1))
    for site, strength in enumerate(strengths):
        half = strength.clamp(min=float(strength[0]) * torch.finfo(strength.dtype).eps).sqrt()
        if bool(half[0] > 0):  # a weight of zeros has nothing to share
            cores[site] = cores[site] * half
            cores[site + 1] = cores[site + 1] / half[:, None, None, None]
    return even(cores)


def even(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same chain with cores of equal norm; a chain that is zero stays as it is."""
    norms = torch.stack([core.norm() for core in cores])
    if not bool((norms > 0).all()):
        return [*cores]
    mean = norms.log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def from_mpo(cores: Sequence[Tensor]) -> Tensor:
    """The weight (O, I) that cores (b, o, i, b') stand for."""
    product = cores[0][0]  # (o, i, b)
    for core in cores[1:]:
        (outputs, inputs), (_, o, i, bond) = product.shape[:2], core.shape
        joined = product.reshape(-1, product.shape[2]) @ core.reshape(len(core), -1)
        product = joined.reshape(outputs, inputs, o, i, bond).transpose(1, 2).reshape(outputs * o, inputs * i, bond)
    return product[..., 0]


def contract(x: Tensor, cores: Sequence[Tensor], order: Order) -> Tensor:
    """`W x` for x (T, I), to (T, O), in one of three orders; see `cheapest_order`."""
    if order == "by the weight":
        return x @ from_mpo(cores).mT
    return _from_left(x, cores) if order == "from the left" else _from_right(x, cores)


def _from_left(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Site 1 first; before site j the state is (T o_1 .. o_{j-1}, b_{j-1} i_j, i_{j+1} .. i_N)."""
    state, rows, rest = x, len(x), x.shape[1]
    for core in cores:
        bond, outputs, inputs, after = core.shape
        rest //= inputs
        matrix = core.permute(1, 3, 0, 2).reshape(outputs * after, bond * inputs)
        state = matrix @ state.reshape(rows, bond * inputs, rest)
        rows *= outputs
    return state.reshape(len(x), math.prod(core.shape[1] for core in cores))


def _from_right(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Site N first; before site j the state is (T i_1 .. i_{j-1}, i_j b_j, o_{j+1} .. o_N)."""
    state, rows, done = x, len(x) * x.shape[1], 1
    for core in reversed(cores):
        bond, outputs, inputs, after = core.shape
        rows //= inputs
        state = core.reshape(bond * outputs, inputs * after) @ state.reshape(rows, inputs * after, done)
        done *= outputs
    return state.reshape(len(x), done)


def products(sites: Sites, chi: int, tokens: int) -> dict[Order, int]:
    """Multiplications of W x for `tokens` vectors, in each order."""
    shapes = core_shapes(sites, chi)
    outputs, inputs = math.prod(sites.outputs), math.prod(sites.inputs)
    left, done, rest = 0, 1, inputs
    for bond, o, i, after in shapes:
        rest //= i
        left += done * (bond * i) * (o * after) * rest
        done *= o
    right, done, rest = 0, 1, inputs
    for bond, o, i, after in reversed(shapes):
        rest //= i
        right += rest * (i * after) * (bond * o) * done
        done *= o
    build, size = 0, math.prod(shapes[0][:3])
    for bond, o, i, after in shapes[1:]:
        build += size * bond * o * i * after
        size *= o * i
    return {
        "from the left": tokens * left,
        "from the right": tokens * right,
        "by the weight": build + tokens * outputs * inputs,
    }


def cheapest_order(sites: Sites, chi: int, tokens: int) -> Order:
    """The order with the fewest multiplications. At bonds worth storing, many tokens are best served by the weight."""
    counted = products(sites, chi, tokens)
    return min(counted, key=lambda order: counted[order])
