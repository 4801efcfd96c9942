"""Turning and cutting a stream, against loops over tokens and against what must not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.linalg.slicing import (
    largest_axes,
    narrow_norm,
    principal_basis,
    random_basis,
    turn_reader,
    turn_writer,
)

WIDTH, TOKENS, EPS = 12, 40, 1e-2


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(seed: int) -> torch.Tensor:
    return normal(seed, TOKENS, WIDTH) @ (normal(seed + 1, WIDTH, WIDTH) * torch.logspace(0, -2, WIDTH).double())


def rms_norm(rows: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """By definition, number by number."""
    out = torch.empty_like(rows)
    for t, row in enumerate(rows.tolist()):
        root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
        out[t] = torch.tensor([v / root for v in row], dtype=rows.dtype) * gain
    return out


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_a_full_rotation_changes_nothing_that_is_read_or_written(seed):
    h, gain = stream(seed), normal(seed + 3, WIDTH).abs() + 0.1
    reader, writer = normal(seed + 4, 7, WIDTH), normal(seed + 5, WIDTH, 7)
    basis, norm = random_basis(h.mT @ h, WIDTH, seed), narrow_norm(EPS, WIDTH, WIDTH)
    assert norm == (1.0, EPS)
    z = h @ basis
    read = rms_norm(h, gain, EPS) @ reader.mT
    ones = torch.ones(WIDTH).double()
    assert torch.allclose(rms_norm(z, norm.gain * ones, norm.eps) @ turn_reader(reader, gain, basis).mT, read)
    written = (z + torch.tanh(read) @ turn_writer(writer, basis).mT) @ basis.mT
    assert torch.allclose(written, h + torch.tanh(read) @ writer.mT)


@pytest.mark.parametrize("width", [1, 5, 11])
def test_a_narrow_norm_divides_by_the_root_mean_square_over_all_places(width):
    h = stream(0)
    norm = narrow_norm(EPS, WIDTH, width)
    cut = h[:, :width]
    expected = cut / (cut.square().sum(1, keepdim=True) / WIDTH + EPS).sqrt()
    assert torch.allclose(rms_norm(cut, torch.full((width,), norm.gain).double(), norm.eps), expected)


def lost(gram: torch.Tensor, basis: torch.Tensor) -> float:
    return float(gram.trace() - (basis.mT @ gram @ basis).trace())


@pytest.mark.parametrize("width", [1, 4, 12])
def test_principal_directions_lose_what_the_slow_way_says_and_no_others_lose_less(width):
    h = stream(1)
    gram = h.mT @ h
    basis = principal_basis(gram, width)
    assert torch.allclose(basis.mT @ basis, torch.eye(width).double(), atol=1e-10)
    tail = torch.linalg.svdvals(h)[width:].square().sum()  # another road to the same optimum
    by_rows = sum(float((row - basis @ (basis.mT @ row)).square().sum()) for row in h)
    assert by_rows == pytest.approx(float(tail), abs=1e-9 * float(gram.trace()))
    for other in (largest_axes(gram, width), random_basis(gram, width, 0)):
        assert torch.allclose(other.mT @ other, torch.eye(width).double(), atol=1e-10)
        assert lost(gram, basis) <= lost(gram, other) + 1e-9


def test_the_largest_axes_are_those_of_most_variance():
    gram = torch.diag(torch.tensor([1.0, 5.0, 3.0, 4.0]).double())
    assert torch.equal(largest_axes(gram, 2).argmax(0), torch.tensor([1, 3]))
