"""Dense times semi-sparse: a weight whose rows are combinations of few atoms each, another few for each row.

    W ~ S D      D (k, I) atoms, dense;  S (O, k) with exactly s nonzeros in every row

With s = k this is low rank; below, a union of subspaces (DSFormer, arXiv 2312.13211). In the metric of the inputs,
|| (W - S D) R ||_F with R R^T = E[x x^T], rows of W R are coded in the atoms of D R, each apart from the others: so the
sparse matrix is on the side of the outputs here. (The paper's weights are transposed: W ~ D S, sparse columns.)

`alternate` finds them by alternating least squares with hard thresholding, in rounds of
    1. some steps of gradient descent on S, keeping the s largest of every row      iterative hard thresholding
    2. the values on that support by conjugate gradients
    3. the atoms by least squares
and `straight_through` by the paper's factoriser: S = the s largest of every row of a dense latent, whose gradient
passes to all of the latent as if nothing had been cut. Both see M = W R only.

Which positions are kept is a bit each, in 16-bit words: at k <= s log2(k), so at every useful size, fewer bits than
indices would take.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.solver import svd

WORD = 16
THRESHOLD_STEPS, CONJUGATE_STEPS = 5, 3
DENSITY = 0.4
"""s / k. Among 0.25, 0.3, 0.4 and 0.5 the least or nearly the least error at every size tried (docs/dsformer.md)."""


class Size(NamedTuple):
    """k atoms, s of them in each row."""

    atoms: int
    nonzeros: int


class SemiSparse(NamedTuple):
    """`sparse @ atoms`; `sparse` has `nonzeros` entries in each row and zeros elsewhere."""

    sparse: Tensor  # (O, k)
    atoms: Tensor  # (k, I)


def words_of(bits: int) -> int:
    """16-bit words for so many bits."""
    return -(-bits // WORD)


def numbers_of(outputs: int, inputs: int, size: Size) -> int:
    """Stored numbers, the words of the support included."""
    return size.atoms * inputs + outputs * size.nonzeros + words_of(outputs * size.atoms)


def size_within(outputs: int, inputs: int, numbers: int, density: float = DENSITY) -> Size | None:
    """The most atoms, then the most nonzeros, within `numbers`; None where not even one atom fits.

    At or above O atoms each row could be an atom of its own: there is nothing left to factorise.
    """

    def at(atoms: int) -> Size:
        return Size(atoms, max(1, min(atoms, round(density * atoms))))

    low, high = 0, outputs
    while low < high:
        middle = (low + high + 1) // 2
        fits = numbers_of(outputs, inputs, at(middle)) <= numbers
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        return None
    spare = (numbers - numbers_of(outputs, inputs, at(low))) // outputs
    return Size(low, min(low, at(low).nonzeros + spare))


def error_of(measured: Tensor, found: SemiSparse) -> float:
    """|| M - S D ||_F^2 / || M ||_F^2; 0 for a matrix of zeros."""
    whole = float(measured.square().sum())
    return float((measured - found.sparse @ found.atoms).square().sum()) / whole if whole > 0 else 0.0


def start(measured: Tensor, atoms: int, *, seed: int = 0) -> SemiSparse:
    """The truncated SVD of M (O, I), its atoms turned at random: S is then dense and its columns have no order."""
    left, values, right = svd(measured)
    rank = min(atoms, len(values))
    drawn = torch.randn(atoms, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn = torch.linalg.qr(drawn).Q.to(measured)
    return SemiSparse((left[:, :rank] * values[:rank]) @ turn.mT, turn @ right[:rank])


def alternate(measured: Tensor, size: Size, *, rounds: int = 30, seed: int = 0) -> SemiSparse:
    """S (O, k) and D (k, I) for M (O, I), by alternating least squares with hard thresholding; the best round's."""
    now, best, least = start(measured, size.atoms, seed=seed), None, math.inf
    for turn in range(rounds):
        now = unit_atoms(now)
        gram, target = now.atoms @ now.atoms.mT, measured @ now.atoms.mT
        sparse = now.sparse if turn == 0 else threshold_steps(now.sparse, gram, target, size.nonzeros)
        support = largest(sparse, size.nonzeros)
        sparse = conjugate_steps(sparse, gram, target, support, CONJUGATE_STEPS)
        now = SemiSparse(sparse, best_atoms(measured, sparse))
        error = error_of(measured, now)
        if error < least:
            best, least = now, error
    assert best is not None, "not one round gave a finite error"
    return best


def straight_through(
    measured: Tensor, size: Size, *, steps: int = 300, rate: float = 0.05, seed: int = 0
) -> SemiSparse:
    """S (O, k) and D (k, I) for M (O, I), by Adam on a dense latent and the atoms; the best step's."""
    latent, atoms = (part.clone() for part in start(measured, size.atoms, seed=seed))
    rates = [rate * part.square().mean().sqrt() for part in (latent, atoms)]
    moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in (latent, atoms)]
    best, least = None, math.inf
    for step in range(1, steps + 1):
        sparse = latent * largest(latent, size.nonzeros)
        missing = sparse @ atoms - measured
        error = float(missing.square().sum())
        if error < least:
            best, least = SemiSparse(sparse, atoms.clone()), error
        gradients = (missing @ atoms.mT, sparse.mT @ missing)
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        for part, gradient, own, (first, second) in zip((latent, atoms), gradients, rates, moments, strict=True):
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.01)
            spread = (second / (1 - 0.99**step)).sqrt()
            part -= share * own * first / (1 - 0.9**step) / (spread + 1e-2 * spread.mean() + 1e-30)
    assert best is not None, "not one step gave a finite error"
    return best


def largest(values: Tensor, count: int) -> Tensor:
    """True at the `count` largest in size of every row; exactly `count`, also among equals."""
    kept = values.abs().topk(count, dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, kept, True)


def unit_atoms(found: SemiSparse) -> SemiSparse:
    """The same product with atoms of norm 1; one that no row uses any more has nothing left but rounding: zero."""
    norms = found.atoms.norm(dim=1)
    alive = norms > norms.max() * torch.finfo(norms.dtype).eps
    norms = torch.where(alive, norms, torch.ones_like(norms))
    return SemiSparse(found.sparse * norms, found.atoms * alive[:, None] / norms[:, None])


def threshold_steps(sparse: Tensor, gram: Tensor, target: Tensor, nonzeros: int) -> Tensor:
    """Iterative hard thresholding (Blumensath and Davies 2009); `gram` D D^T (k, k), `target` M D^T (O, k)."""
    steepest = torch.linalg.eigvalsh(gram)[-1].clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(THRESHOLD_STEPS):
        sparse = sparse + (target - sparse @ gram) / steepest
        sparse = sparse * largest(sparse, nonzeros)
    return sparse


def conjugate_steps(sparse: Tensor, gram: Tensor, target: Tensor, support: Tensor, steps: int) -> Tensor:
    """Steps towards the least-squares values on `support` (O, k), all rows at once, from those of `sparse`."""
    eps, tiny = torch.finfo(gram.dtype).eps, torch.finfo(gram.dtype).tiny
    diagonal = gram.diagonal()
    diagonal = diagonal.clamp(min=float(diagonal.max()) * eps + tiny)
    done = eps**2 * (target.square() / diagonal).sum(1, keepdim=True)  # below it a residual is rounding
    values = sparse * support
    residual = (target - values @ gram) * support
    turned = residual / diagonal
    direction, size = turned, (residual * turned).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram) * support
        slope = (direction * image).sum(1, keepdim=True)
        length = torch.where((size > done) & (slope > 0), size / slope.clamp(min=tiny), 0.0)
        values = values + length * direction
        residual = residual - length * image
        turned = residual / diagonal
        after = (residual * turned).sum(1, keepdim=True)
        direction = turned + torch.where(size > done, after / size.clamp(min=tiny), 0.0) * direction
        size = after
    return values


def best_values(measured: Tensor, atoms: Tensor, support: Tensor) -> Tensor:
    """Least-squares S (O, k) on `support` (O, k), which has as many entries in every row: one s x s system a row."""
    rows, nonzeros = len(measured), int(support[0].sum())
    place = support.nonzero()[:, 1].view(rows, nonzeros)
    gram, target = atoms @ atoms.mT, measured @ atoms.mT
    found = torch.zeros_like(target)
    for here in parts(rows, nonzeros**2):
        systems = gram[place[here, :, None], place[here, None, :]]
        systems.diagonal(dim1=1, dim2=2).add_(1e-10 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        values = torch.linalg.solve(systems, target[here].gather(1, place[here])[..., None])[..., 0]
        found[here] = torch.zeros_like(target[here]).scatter_(1, place[here], values)
    return found


def best_atoms(measured: Tensor, sparse: Tensor) -> Tensor:
    """Least-squares D (k, I) for S: the answer for M = W R is that for W, times R, whatever R is."""
    system = sparse.mT @ sparse
    damping = 1e-7 * system.diagonal().mean()
    if damping == 0:
        return measured.new_zeros(sparse.shape[1], measured.shape[1])
    eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
    return torch.linalg.solve(system + damping * eye, sparse.mT @ measured)


def parts(rows: int, numbers_a_row: int, at_most: int = 2**25) -> Iterator[slice]:
    """Slices over `rows` that hold `at_most` numbers each, or one row."""
    step = max(1, at_most // max(numbers_a_row, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def pack_bits(mask: Tensor) -> Tensor:
    """A mask (bool) as int16 words, row after row, the lowest bit of a word first, the last word filled with zeros."""
    bits = mask.flatten().to(torch.int32)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % WORD)).view(-1, WORD)
    powers = 2 ** torch.arange(WORD, dtype=torch.int32, device=mask.device)
    words = (bits * powers).sum(1)
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)


def unpack_bits(words: Tensor, rows: int, columns: int) -> Tensor:
    """The mask (rows, columns); ValueError when a bit past its end is set or the number of words is another."""
    if len(words) != words_of(rows * columns):
        raise ValueError(f"{len(words)} words; {rows} x {columns} bits take {words_of(rows * columns)}")
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = ((words.to(torch.int32)[:, None] >> shifts) & 1).bool().flatten()
    if bool(bits[rows * columns :].any()):
        raise ValueError(f"a bit behind the {rows} x {columns} of the support is set: damaged file")
    return bits[: rows * columns].view(rows, columns)
