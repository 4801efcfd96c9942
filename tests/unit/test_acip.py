"""ACIP: masks, penalty, order, exact cut, folding and counting against slow oracles; runs on a tiny random Llama."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from command_line import PLAIN, call, small_model
from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim import job
from spectrim.engines import measure
from spectrim.engines.layerwise import decompose_all
from spectrim.engines.learned import Learned, skeleton
from spectrim.engines.masked import FIRST_PRESSURE, Pressing, relax, train_masks
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.extinction import cost_table, counts_within, numbers_of, order_of
from spectrim.linalg.factor import decompose
from spectrim.methods.weights.acip import ACIP
from spectrim.models.walk import Walk, find_layers
from spectrim.nn.masked import MaskedLinear, binary
from spectrim.registry import make_method
from spectrim.stats import Stats
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

KEEP = 0.6
SMALL = {"adapter_rank": 2, "adapter_alpha": 1.0, "batch_size": 4, "pressure_every": 2}


@pytest.fixture(autouse=True, scope="module")
def in_float32():
    """The same arithmetic on machines with and without bf16 products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama-gqa-bias")


@pytest.fixture(scope="module")
def walk(model) -> Walk:
    return find_layers(model)


@pytest.fixture(scope="module")
def spectra(model, walk):
    return decompose_all(ACIP(), model, walk, {la.name: Stats(tokens=1) for la in walk.layers})


IDS = token_ids(12, 16, seed=3)


def layer(outputs: int = 7, inputs: int = 5, *, seed: int = 0, bias: bool = True) -> MaskedLinear:
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    made = MaskedLinear(
        decompose(weight), torch.randn(outputs) if bias else None, rank=2, alpha=1.0, start=0.02, seed=seed
    )
    with torch.no_grad():
        made.up.normal_()
    return made


# ---------- masks


def test_a_mask_is_binary_forward_and_a_ramp_backward():
    m = torch.tensor([0.02, 1e-9, 0.0, -0.3, 5.0], requires_grad=True)
    mask = binary(m, 0.02)
    torch.testing.assert_close(mask, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]))
    (mask * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert m.grad is not None
    torch.testing.assert_close(m.grad, torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0]) / 0.02)


def test_the_straight_through_gradient_is_what_finite_differences_of_a_soft_mask_give():
    """Oracle: the loss as a smooth function of real factors c on the components, at c = 1[m > 0], over the start."""
    made = layer()
    x, y = torch.randn(11, 5), torch.randn(11, 7)
    with torch.no_grad():
        made.m[1], made.m[3] = -0.01, 0.0
    F.mse_loss(made(x), y).backward()
    adapter = made.scale * made.up.detach().double() @ made.down.detach().double()
    assert made.bias is not None

    def loss(c: Tensor) -> float:
        weight = (made.left.double() * c) @ made.right.double() + adapter
        return float((x.double() @ weight.mT + made.bias.double() - y.double()).square().mean())

    alive = (made.m.detach() > 0).double()
    assert made.m.grad is not None
    for k in range(5):
        step = torch.zeros(5).double()
        step[k] = 1e-5
        expected = (loss(alive + step) - loss(alive - step)) / 2e-5 / 0.02 * float(alive[k])
        assert float(made.m.grad[k]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert made.m.grad[1] == made.m.grad[3] == 0


def test_the_penalty_is_the_one_sided_l1_norm():
    m = torch.tensor([0.5, 1e-4, -2.0, 0.0], requires_grad=True)
    m.relu().sum().backward()
    assert m.grad is not None
    assert torch.equal(ACIP().press(m.detach()), m.grad)


def test_the_pressure_reaches_living_masks_only_and_leaves_the_loss_gradient(model, walk, spectra):
    method = ACIP(steps=10, pressure=0.25, **SMALL)
    student = skeleton(model)
    masked = relax(method, student, walk, spectra, 0)
    pressing = Pressing(method, walk, masked, KEEP)
    first, second, *_ = masked.values()
    with torch.no_grad():
        first.m[3] = -1.0
    first.m.grad = torch.full_like(first.m, 2.0)
    pressing.press(0)
    assert first.m.grad.tolist() == [2.25] * 3 + [2.0] + [2.25] * (len(first.m) - 4)
    assert second.m.grad is not None  # a layer that no token of the batch reached
    assert bool((second.m.grad == 0.25).all())
    pressing.fix(1, pressing.numbers())
    pressing.plan = pressing.finish()
    first.m.grad = None
    pressing.press(1)
    assert first.m.grad is None


def test_a_pressure_that_is_not_given_is_measured_in_the_size_of_the_gradients(model, walk, spectra):
    method = ACIP(steps=10, **SMALL)
    masked = relax(method, skeleton(model), walk, spectra, 0)
    pressing = Pressing(method, walk, masked, KEEP)
    first, second, *_ = masked.values()
    first.m.grad, second.m.grad = torch.full_like(first.m, 3.0), torch.full_like(second.m, -1.0)
    squares = 9.0 * len(first.m) + len(second.m)
    size = (squares / (len(first.m) + len(second.m))) ** 0.5
    pressing.press(0)
    assert pressing.pressure == FIRST_PRESSURE
    assert first.m.grad.tolist() == pytest.approx([3.0 + FIRST_PRESSURE * size] * len(first.m))


# ---------- order and cut


def test_order_by_step_of_extinction_then_value_then_depth():
    masks = [torch.tensor([0.01, 0.03, -0.2, -0.1]), torch.tensor([0.01, -0.5, 0.01, -0.1])]
    died = [torch.tensor([-1, -1, 7, 7]), torch.tensor([-1, 9, -1, 3])]
    where = [(int(a), int(b)) for a, b in zip(*order_of(masks, died), strict=True)]
    # alive: .03, then .01 three times by depth (0 of 4 before 0 of 4 in the later layer, 2 of 4 last); then 9, 7, 7, 3
    assert where == [(0, 1), (0, 0), (1, 0), (1, 2), (1, 1), (0, 3), (0, 2), (1, 3)]


@pytest.mark.parametrize("pivot", [False, True])
def test_the_cost_table_counts_the_adapter_and_stops_at_dense(pivot):
    table = cost_table(20, 12, 3, pivot=pivot)
    for k, cost in enumerate(table.tolist()):
        r = k + 3
        counted = r * 12 + (20 - r) * r + 3 if pivot else r * (20 + 12)
        assert cost == (min(counted, 240) if r < 12 else 240), k
    assert len(table) == 13


@pytest.mark.parametrize("pivot", [False, True])
def test_the_cut_is_the_last_that_fits(pivot):
    """Oracle: every cut tried."""
    tables = [cost_table(20, 12, 2, pivot=pivot), cost_table(12, 12, 2, pivot=pivot), cost_table(9, 30, 2, pivot=pivot)]
    sizes = [12, 12, 9]
    order = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    order = order[torch.randperm(33, generator=torch.Generator().manual_seed(0))]
    dense = 20 * 12 + 12 * 12 + 9 * 30
    for budget in (250, 333, 470, 560, dense):
        every = [torch.bincount(order[:n], minlength=3) for n in range(34)]
        fits = [counts for counts in every if numbers_of(counts, tables) <= budget]
        counts = counts_within(order, tables, budget)
        assert torch.equal(counts, fits[-1])
    with pytest.raises(AssertionError, match="adapters alone"):
        counts_within(order, tables, 10)


# ---------- folding


def test_folding_gives_the_weight_of_training():
    for start in range(3):
        made = layer(outputs=9, inputs=12, seed=start)
        with torch.no_grad():
            made.m[[0, 4, 7]] = -0.1
        x = torch.randn(6, 12)
        trained = made(x)
        made.bury(3)
        made.fix(made.died < 0)
        torch.testing.assert_close(made(x), trained, rtol=0, atol=0)
        left, right = made.folded()
        assert left.shape == (9, 6 + 2)
        assert right.shape == (6 + 2, 12)
        torch.testing.assert_close(left @ right, made.weight_now(), rtol=1e-5, atol=1e-5)
        assert made.died.tolist() == [3, -1, -1, -1, 3, -1, -1, 3, -1]


def test_a_component_keeps_the_step_at_which_it_first_went_out():
    made = layer()
    for step, value in ((2, -0.1), (3, -0.2), (4, 0.1)):
        with torch.no_grad():
            made.m[1] = value
        made.bury(step)
    assert made.died.tolist() == [-1, 2, -1, -1, -1]


def test_at_the_start_the_layer_is_the_dense_one_and_adapters_are_loras(model, walk, spectra):
    student = skeleton(model)
    masked = relax(ACIP(**SMALL), student, walk, spectra, 5)
    torch.testing.assert_close(logits_of(student, IDS), logits_of(model, IDS), rtol=1e-4, atol=1e-4)
    downs = [la.down.detach() for la in masked.values()]
    assert all(not la.up.any() for la in masked.values())
    assert all(float(d.abs().max()) <= d.shape[1] ** -0.5 for d in downs)
    same = [d for d in downs if d.shape == downs[0].shape]
    assert len({tuple(d.flatten().tolist()) for d in same}) == len(same) > 1


# ---------- training as a whole


def run(model, walk, spectra, keep: float = KEEP, **options) -> tuple[ACIP, Learned]:
    method = ACIP(**{**SMALL, **options})
    return method, train_masks(method, model, walk, spectra, keep, IDS)


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("keep", [0.35, 0.6, 0.9])
def test_everything_is_counted_and_the_budget_is_met(model, walk, spectra, storage, keep):
    _, result = run(model, walk, spectra, keep, steps=30, storage=storage)
    total = 0
    for la in walk.layers:
        target, factors = result.plan.targets[la.name], result.factors[la.name]
        rank = factors.left.shape[1]
        assert factors.right.shape[0] == rank
        if target.codec == "dense":
            assert rank == min(la.outputs, la.inputs) + 2  # nothing masked, the adapter multiplied in
            total += la.numbers
            continue
        assert rank == target.rank
        bias = la.numbers - la.weight_numbers
        cost = rank * (la.outputs + la.inputs)
        total += bias + (cost if storage == "factor" else cost - rank**2 + -(-la.outputs // 8))
        assert cost - (storage == "pivot") * rank**2 < la.weight_numbers
    assert total == result.plan.numbers_after
    assert 0.97 * keep * walk.numbers <= total <= int(keep * walk.numbers)


@pytest.mark.parametrize("steps", [20, 60])
def test_the_size_is_reached_near_the_stated_share_and_adapters_train_on(model, walk, spectra, steps):
    _, result = run(model, walk, spectra, steps=steps, reach=0.5)
    at = result.details["fixed_at_step"]
    assert 0.2 * steps < at < 0.75 * steps
    assert not [w for w in result.warnings if "above the request" in w]
    assert result.details["keep_before_cut"] <= KEEP
    assert result.details["cut"] == 0
    assert result.keeps[0] == 1.0
    assert all(a >= b for a, b in zip(result.keeps[:at], result.keeps[1:at], strict=False))
    assert set(result.keeps[at:]) == {result.plan.keep}
    assert min(result.losses[-5:]) < max(result.losses[at : at + 5])


SLOW = {"steps": 20, "schedule": "open"}


def test_a_size_that_is_not_reached_is_cut_and_said(model, walk, spectra):
    _, result = run(
        model, walk, spectra, steps=20, schedule="open", pressure=1e-3, growth=1.01, mask_learning_rate=5e-5
    )
    (warning,) = result.warnings
    assert warning.startswith("after 15 of 20 steps the masks stood at keep 1.0000, above the request 0.6")
    assert "trained for 5 steps" in warning
    assert result.details["cut"] > 0
    assert result.details["returned"] == 0
    assert result.plan.numbers_after <= int(KEEP * walk.numbers)
    _, one = run(model, walk, spectra, steps=1)
    assert len(one.losses) == 1
    assert one.plan.numbers_after <= int(KEEP * walk.numbers)
    assert one.warnings[0].startswith("after 1 of 1 steps")


def kl_of(model: PreTrainedModel, walk: Walk, result: Learned) -> float:
    """KL(dense || folded) on the training windows, with plain linear layers: nothing of the training code is used."""
    student = skeleton(model)
    for la in walk.layers:
        linear = nn.Linear(la.inputs, la.outputs)
        linear.weight = nn.Parameter(result.factors[la.name].left @ result.factors[la.name].right)
        bias = model.get_submodule(la.name).bias
        assert isinstance(bias, Tensor)
        linear.bias = nn.Parameter(bias.detach())
        student.set_submodule(la.name, linear)
    log_p, log_q = logits_of(model, IDS).log_softmax(-1), logits_of(student, IDS).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_the_adapters_repair(model, walk, spectra):
    """Against the same run with adapters that hardly move."""
    options = {"steps": 60, "target": "dense", "reach": 0.3, "adapter_rank": 4}
    _, trained = run(model, walk, spectra, learning_rate=0.01, **options)
    _, still = run(model, walk, spectra, learning_rate=1e-9, **options)
    assert kl_of(model, walk, trained) < 0.8 * kl_of(model, walk, still)
    # What was trained is what was folded: 12 windows in batches of 4, so three losses are the whole text.
    assert sum(trained.losses[-3:]) / 3 == pytest.approx(kl_of(model, walk, trained), rel=0.02)


def test_the_teacher_is_unchanged_and_the_seed_decides_the_bits(model, walk, spectra):
    before = state_of(model)
    method = ACIP(steps=8, **SMALL)
    first, again, other = (train_masks(method, model, walk, spectra, KEEP, IDS, seed=s) for s in (3, 3, 4))
    assert_same_state(before, state_of(model))
    assert first.losses == again.losses
    assert all(torch.equal(f.left, again.factors[n].left) for n, f in first.factors.items())
    assert first.losses != other.losses


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, model, walk, spectra):
    monkeypatch.setattr(ACIP, "loss", lambda _self, logits, _ids, _teacher: logits.sum() * math.nan)
    with pytest.raises(NumericalError, match=r"acip: the loss is nan at step 0 of 4.*learning_rate=0\.00033"):
        run(model, walk, spectra, steps=4)


def test_adapters_that_do_not_fit_are_refused_with_a_rank_that_does(model, walk, spectra):
    with pytest.raises(UsageError, match=r"adapters of rank 16 alone take [\d,]+ .*--set adapter_rank=(\d+)") as caught:
        run(model, walk, spectra, 0.3, steps=4, adapter_rank=16)
    rank = int(str(caught.value).split("adapter_rank=")[1].split(")")[0])
    _, result = run(model, walk, spectra, 0.3, steps=4, adapter_rank=rank)
    assert result.plan.keep <= 0.3


# ---------- the method's own functions, by hand


def test_the_loss_is_that_of_the_next_token_or_kl():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    log_p = logits.double().log_softmax(-1)
    by_hand = -sum(float(log_p[b, t, ids[b, t + 1]]) for b in range(2) for t in range(4)) / 8
    assert float(ACIP().loss(logits, ids, None)) == pytest.approx(by_hand, rel=1e-5)
    assert float(ACIP(target="dense").loss(logits, ids, logits)) == pytest.approx(0.0, abs=1e-6)
    assert float(ACIP(target="dense").loss(logits, ids, 2 * logits)) > 0.01
    assert ACIP(target="dense").compares_with_dense
    assert not ACIP().compares_with_dense


def test_pressure_follows_the_schedule():
    paper = make_method("acip", "paper")
    assert isinstance(paper, ACIP)
    assert paper.mask_rate() == paper.learning_rate == 5e-5
    assert paper.next_pressure(1e-3, fell=1.0, needed=0.0) == pytest.approx(1.01e-3)  # whatever happened
    tracked = ACIP(steps=80, reach=0.5, pressure_every=4, mask_start=0.02)
    assert tracked.mask_rate() == pytest.approx(4 * 0.02 / 40)
    growth = 1e4 ** (1 / 10)  # ten changes in 40 steps
    assert tracked.next_pressure(1.0, fell=0.1, needed=0.2) == pytest.approx(growth)
    assert tracked.next_pressure(1.0, fell=0.3, needed=0.2) == pytest.approx(1 / growth)
    assert tracked.next_pressure(1.0, fell=0.3, needed=math.inf) == pytest.approx(growth)
    assert ACIP(growth=1.5).next_pressure(2.0, fell=0.0, needed=1.0) == 3.0


# ---------- on the command line


def test_the_command_line_counts_what_it_wrote_and_reports_how_it_came_there(tmp_path):
    folder = small_model(tmp_path / "model")
    options = ("--method", "acip", "--keep", "0.7", "--set", "steps=12", "--set", "adapter_rank=2")
    small = ("--set", "batch_size=2", "--train-windows", "8")
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        answer = call("compress", folder, "--out", tmp_path / "out", *PLAIN, "--json", *options, *small)
    assert answer.code == 0, answer.err
    report = answer.json
    assert 0.66 < report["stored"]["keep"] <= 0.7
    assert report["stored"]["linear_numbers"] == report["stored"]["linear_numbers_planned"]
    learning = report["learning"]
    assert len(learning["losses"]) == len(learning["keeps"]) == 12
    assert learning["keeps"][-1] == pytest.approx(report["stored"]["keep"])
    assert learning["details"]["fixed_at_step"] < 12
    assert report["text"]["training"]["windows"] == 8
    assert not call("plan", folder, "--json", *options).json["ranks_known"]


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_adapters_that_do_not_fit_are_refused_before_weights_are_read(tmp_path, command):
    folder = small_model(tmp_path / "model")
    out = ("--out", tmp_path / "out") if command == "compress" else ()
    with mock.patch.object(job, "load_dense", side_effect=AssertionError("loaded")):
        answer = call(command, folder, *out, "--method", "acip", "--keep", "0.5")
    assert answer.code == 2
    assert "adapters of rank 32 alone take" in answer.message
    assert not (tmp_path / "out").exists()


# ---------- going on


def compressed(checkpoint: MemoryCheckpoint | None = None, **options) -> Outcome:
    method = make_method("acip", options={**SMALL, "steps": 14, "storage": "pivot"})
    return compress_model(
        tiny("llama-gqa-bias"), method, KEEP, token_ids(8, 16), IDS, seed=1, recovery=("kl:2",),
        checkpoint=checkpoint, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> Outcome:
    return compressed()


@pytest.mark.parametrize("step", [1, 3, 5, 6, 7, 8, 9, 10, 13, 14])
def test_killed_and_gone_on_with_is_bit_for_bit_the_whole(whole, step):
    assert whole.learned is not None
    assert 3 < whole.learned.details["fixed_at_step"] < 12  # states before and after the masks are fixed
    checkpoint = MemoryCheckpoint(every=1)
    with pytest.raises(Killed):
        compressed(checkpoint, progress=kill_at("learn masks", step))
    again = compressed(checkpoint)
    mine, theirs = whole.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert again.learned is not None
    assert again.plan == whole.plan
    assert again.learned.losses == whole.learned.losses
    assert again.learned.keeps == whole.learned.keeps
    assert again.learned.details == whole.learned.details
