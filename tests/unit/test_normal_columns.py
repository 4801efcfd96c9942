"""NormalFloat codes by the column solver: against columns one by one, and what feedback is worth."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg.columns import inverse_root
from spectrim.linalg.normal_columns import SHARES, round_columns_to_normal
from spectrim.linalg.normal_float import Form, from_normal, normal_levels, round_to_normal, scales_of, second_level
from spectrim.linalg.quantised_low_rank import calibrated_importance, codes_and_factors, weighted_error

FORMS = [Form(2, 8, 4, 16), Form(3, 16, 8, 4), Form(4, 5, 2, 64)]


def given(seed: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that depend on each other."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=make, dtype=torch.float64)
    mixed = torch.randn(4 * inputs, inputs // 2, generator=make, dtype=torch.float64)
    spread = torch.randn(inputs // 2, inputs, generator=make, dtype=torch.float64)
    x = mixed @ spread + 0.3 * torch.randn(4 * inputs, inputs, generator=make, dtype=torch.float64)
    return weight, x.mT @ x / len(x)


def slow(weight: Tensor, upper: Tensor, form: Form) -> Tensor:
    """Row by row, column by column, every feedback at once; scales by trying them all."""
    levels, steps = normal_levels(form.bits), 2**form.scale_bits
    blocks = -(-weight.shape[1] // form.block)
    highest = torch.full((len(weight), blocks), steps - 1)
    tops, out = scales_of(highest, second_level(weight, form), form), torch.empty_like(weight)
    for row, start in ((r, s) for r in range(len(weight)) for s in range(0, weight.shape[1], form.block)):
        if start == 0:
            now = weight[row].clone()
        part = now[start : start + form.block]
        top = float(tops[row, start // form.block])
        counts = upper.diagonal()[start : start + form.block] ** -2
        tried = []
        for share in SHARES:
            code = min(max(round(share * float(part.abs().max()) / top * steps - 1), 0), steps - 1)
            scale = top * (code + 1) / steps
            nearest = levels[(part[:, None] / scale - levels).abs().argmin(1)] * scale
            tried.append((float(((nearest - part) ** 2 * counts).sum()), scale))
        scale = min(tried, key=lambda pair: pair[0])[1]
        for column in range(start, min(start + form.block, weight.shape[1])):
            out[row, column] = levels[(now[column] / scale - levels).abs().argmin()] * scale
            now[column + 1 :] -= (now[column] - out[row, column]) / upper[column, column] * upper[column, column + 1 :]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 24), (5, 35)])
def test_it_is_columns_one_by_one(form, shape):
    weight, gram = given(3, *shape)
    upper = inverse_root(gram)
    found = from_normal(round_columns_to_normal(weight, upper, form), form, torch.float64)
    torch.testing.assert_close(found, slow(weight, upper, form), rtol=1e-9, atol=1e-11)


def loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    return float(torch.trace((weight - rounded) @ gram @ (weight - rounded).mT))


@pytest.mark.parametrize("form", FORMS)
def test_feedback_loses_less_of_the_outputs(form):
    for seed in range(5):
        weight, gram = given(seed, 32, 64)
        fed = from_normal(round_columns_to_normal(weight, inverse_root(gram), form), form, torch.float64)
        nearest = from_normal(round_to_normal(weight, form), form, torch.float64)
        assert loss(weight, fed, gram) < 0.8 * loss(weight, nearest, gram)


def test_inputs_that_do_not_depend_on_each_other_need_no_feedback():
    weight, _ = given(0, 8, 32)
    form = Form(4, 16, 8, 16)
    codes = round_columns_to_normal(weight, inverse_root(torch.eye(32, dtype=torch.float64)), form)
    rounded, plain = (from_normal(c, form, torch.float64) for c in (codes, round_to_normal(weight, form)))
    assert (rounded - weight).square().sum() <= (plain - weight).square().sum()


def test_zeros_and_single_numbers_stay():
    weight = torch.zeros(4, 32, dtype=torch.float64)
    weight[1, 3] = -2.0
    form = Form(2, 16, 2, 4)
    found = from_normal(round_columns_to_normal(weight, torch.eye(32, dtype=torch.float64), form), form, torch.float64)
    torch.testing.assert_close(found, weight)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_calibrated_alternation_reports_its_error_and_is_better_there(rank):
    weight, gram = given(1, 24, 48)
    fisher = torch.rand(24, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    form, importance = Form(2, 16, 4, 16), calibrated_importance(fisher, gram)
    found = codes_and_factors(weight, form, rank, importance, iterations=20)
    stands = from_normal(found.rounded, form, torch.float64) + found.factors.left @ found.factors.right
    missing = weight - stands
    rows = fisher.mean(1)
    assert found.error == pytest.approx(float((rows * ((missing @ gram) * missing).sum(1)).sum()), rel=1e-6)
    plain = weight - from_normal(round_to_normal(weight, form), form, torch.float64)
    assert found.error < 0.8 * weighted_error(plain, importance)
