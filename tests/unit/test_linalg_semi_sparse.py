"""Dense times semi-sparse against the definition, least squares, an exhaustive search and truncated SVD."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from spectrim.linalg.factor import decompose
from spectrim.linalg.metric import root_of
from spectrim.linalg.semi_sparse import (
    SemiSparse,
    Size,
    alternate,
    best_atoms,
    best_values,
    conjugate_steps,
    error_of,
    largest,
    numbers_of,
    pack_bits,
    size_within,
    start,
    straight_through,
    threshold_steps,
    unit_atoms,
    unpack_bits,
)

FINDERS = {"alternate": alternate, "straight_through": straight_through}
every_finder = pytest.mark.parametrize("find", FINDERS.values(), ids=list(FINDERS))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(seed: int = 0, outputs: int = 80, inputs: int = 24, atoms: int = 12, nonzeros: int = 3) -> Tensor:
    """A matrix of full rank `atoms` whose rows use few of them each."""
    sparse = normal(seed, outputs, atoms)
    return (sparse * largest(normal(seed + 1, outputs, atoms), nonzeros)) @ normal(seed + 2, atoms, inputs)


def low_rank_error(measured: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(measured).square()
    return float(values[rank:].sum() / values.sum())


def test_values_on_a_support_equal_lstsq_row_by_row():
    measured, atoms = normal(0, 9, 14), normal(1, 7, 14)
    support = largest(normal(2, 9, 7), 3)
    slow = torch.zeros(9, 7, dtype=torch.float64)
    for row in range(9):
        here = support[row].nonzero().flatten()
        slow[row, here] = torch.linalg.lstsq(atoms[here].mT, measured[row, :, None]).solution[:, 0]
    assert torch.allclose(best_values(measured, atoms, support), slow, rtol=0, atol=1e-7)


def test_conjugate_steps_reach_the_least_squares_values_from_anywhere():
    measured, atoms = normal(0, 9, 14), normal(1, 7, 14)
    support = largest(normal(2, 9, 7), 4)
    gram, target = atoms @ atoms.mT, measured @ atoms.mT
    found = conjugate_steps(normal(3, 9, 7), gram, target, support, steps=4)  # as many as there are unknowns
    assert torch.allclose(found, best_values(measured, atoms, support), rtol=0, atol=1e-6)
    assert bool((found[~support] == 0).all())


def test_each_conjugate_step_lowers_the_error_of_every_row():
    measured, atoms = normal(4, 9, 14), normal(5, 7, 14)
    support, gram, target = largest(normal(6, 9, 7), 5), atoms @ atoms.mT, measured @ atoms.mT
    errors = [
        (measured - conjugate_steps(normal(7, 9, 7), gram, target, support, n) @ atoms).square().sum(1)
        for n in range(4)
    ]
    assert all(bool((b <= a + 1e-12).all()) for a, b in pairwise(errors))


def test_thresholding_never_raises_the_error_and_ends_near_the_best_support():
    """Against all 35 supports of every row: none is better than the best, and together they lose a sixth at most."""
    measured, atoms = normal(8, 20, 14), unit_atoms(SemiSparse(normal(9, 2, 7), normal(10, 7, 14))).atoms
    gram, target = atoms @ atoms.mT, measured @ atoms.mT
    sparse = torch.linalg.solve(gram, target.mT).mT
    sparse = sparse * largest(sparse, 3)
    before = (measured - sparse @ atoms).square().sum(1)
    stepped = threshold_steps(sparse, gram, target, 3)
    assert bool(((measured - stepped @ atoms).square().sum(1) <= before + 1e-12).all())
    found = best_values(measured, atoms, largest(stepped, 3))
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for chosen in combinations(range(7), 3):
        support = torch.zeros(20, 7, dtype=torch.bool)
        support[:, list(chosen)] = True
        best = torch.minimum(best, (measured - best_values(measured, atoms, support) @ atoms).square().sum(1))
    own = (measured - found @ atoms).square().sum(1)
    assert bool((own >= best - 1e-9).all())
    assert float(own.sum()) < 7 / 6 * float(best.sum())
    assert int((own <= best * 1.001).sum()) >= 8


def test_atoms_for_a_fixed_support_do_not_depend_on_the_metric():
    """D = S^+ W solves || (W - S D) R || for every invertible R: what is found for W R is that for W, times R."""
    weight, root = normal(0, 30, 10), normal(1, 10, 10)
    sparse = normal(2, 30, 6) * largest(normal(3, 30, 6), 3)
    plain, measured = best_atoms(weight, sparse), best_atoms(weight @ root, sparse)
    assert torch.allclose(plain @ root, measured, rtol=1e-6, atol=1e-6)
    assert torch.allclose(plain, torch.linalg.lstsq(sparse, weight).solution, rtol=1e-5, atol=1e-5)


@every_finder
def test_exactly_as_many_nonzeros_in_every_row_as_said(find):
    found = find(normal(0, 30, 12), Size(8, 3))
    assert found.sparse.shape == (30, 8)
    assert found.atoms.shape == (8, 12)
    assert bool(((found.sparse != 0).sum(1) <= 3).all())


def test_a_planted_union_of_subspaces_is_found_where_low_rank_fails():
    """Rank 12 with 3 of 12 atoms a row: 12 * 24 + 80 * 3 + 60 = 588 numbers, for which two factors have rank 5."""
    measured = planted()
    best = min(error_of(measured, alternate(measured, Size(12, 3), rounds=200, seed=seed)) for seed in range(3))
    assert numbers_of(80, 24, Size(12, 3)) == 588
    assert best < 0.5 * low_rank_error(measured, 588 // (80 + 24))


@every_finder
def test_dense_rows_are_the_truncated_svd(find):
    """s = k is low rank, and the start is its optimum."""
    measured = normal(5, 20, 15)
    assert error_of(measured, find(measured, Size(6, 6))) == pytest.approx(low_rank_error(measured, 6), rel=1e-6)


def test_better_than_svd_at_equal_numbers_in_the_metric_of_correlated_inputs():
    """Even on noise, whose spectrum is flat: the support's words are counted."""
    weight = normal(11, 96, 64)
    inputs = normal(12, 500, 64) @ normal(13, 64, 64)
    measured = weight @ root_of(inputs.mT @ inputs / 500).root
    for keep in (0.8, 0.5):
        numbers = int(keep * 96 * 64)
        size = size_within(96, 64, numbers)
        assert size is not None
        assert numbers_of(96, 64, size) <= numbers
        energy = decompose(measured).energy
        svd = float(energy[numbers // (96 + 64) :].sum() / energy.sum())
        assert error_of(measured, alternate(measured, size)) < 0.9 * svd


def test_more_rounds_are_never_worse():
    measured = planted(3)
    errors = [error_of(measured, alternate(measured, Size(12, 3), rounds=n)) for n in (1, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_the_straight_through_factoriser_lowers_the_error_and_alternating_lowers_it_further():
    """Real weights show the same (docs/dsformer.md): the paper's factoriser is for the loss of a task, not for this."""
    measured = planted(3)
    first, last = (error_of(measured, straight_through(measured, Size(12, 3), steps=n)) for n in (1, 300))
    assert last < 0.5 * first
    assert error_of(measured, alternate(measured, Size(12, 3))) < 1.2 * last


@every_finder
def test_units_do_not_matter(find):
    measured = planted(4, 30, 12, 6, 2)
    plain, scaled = find(measured, Size(6, 2)), find(1e4 * measured, Size(6, 2))
    assert error_of(1e4 * measured, scaled) == pytest.approx(error_of(measured, plain), rel=1e-4)


@every_finder
def test_zeros_low_rank_and_more_atoms_than_inputs_stay_finite(find):
    for measured, size in (
        (torch.zeros(10, 6).double(), Size(4, 2)),
        (torch.outer(normal(0, 10), normal(1, 6)), Size(4, 2)),
        (normal(2, 10, 6), Size(9, 2)),
    ):
        found = find(measured, size)
        assert all(bool(torch.isfinite(part).all()) for part in found)
        assert error_of(measured, found) <= 1


def test_the_start_is_the_truncated_svd():
    measured = normal(6, 20, 15)
    assert error_of(measured, start(measured, 6)) == pytest.approx(low_rank_error(measured, 6), rel=1e-9)
    assert error_of(measured, start(measured, 18)) < 1e-20  # more atoms than the rank


def test_sizes_are_the_largest_that_fit():
    for numbers in (0, 40, 41, 500, 1800, 2304):
        size = size_within(48, 32, numbers, 0.4)
        if size is None:
            assert numbers_of(48, 32, Size(1, 1)) > numbers
            continue
        assert numbers_of(48, 32, size) <= numbers
        assert 1 <= size.nonzeros <= size.atoms <= 48
        larger = Size(size.atoms + 1, max(1, round(0.4 * (size.atoms + 1))))
        assert size.atoms == 48 or numbers_of(48, 32, larger) > numbers
        denser = Size(size.atoms, size.nonzeros + 1)
        assert size.nonzeros == size.atoms or numbers_of(48, 32, denser) > numbers


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 7), (4, 33)])
def test_bits_survive_packing_and_words_are_what_the_format_says(shape):
    mask = normal(0, *shape) > 0
    words = pack_bits(mask)
    assert words.dtype == torch.int16
    assert len(words) == -(-mask.numel() // 16)
    assert torch.equal(unpack_bits(words, *shape), mask)
    flat = mask.flatten().tolist()
    for at, word in enumerate(words.tolist()):
        assert word % 2**16 == sum(2**k for k, bit in enumerate(flat[16 * at : 16 * at + 16]) if bit)


def test_words_that_do_not_fit_are_refused():
    words = pack_bits(torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 words; 3 x 6 bits take 2"):
        unpack_bits(words, 3, 6)
    with pytest.raises(ValueError, match="a bit behind the 3 x 5"):
        unpack_bits(torch.full_like(words, -1), 3, 5)
