"""Models measured block by block: the same statistics, the same result, and memory that runs out on the way."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from memory_checkpoint import MemoryCheckpoint
from spectrim.engines import measure as whole
from spectrim.engines import measure_blocks, pipeline, recompute, way
from spectrim.engines import shelf as shelf_module
from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.relay import Relay
from spectrim.engines.shelf import Shelf, SpectraShelf, StatsShelf, pack_symmetric, unpack_symmetric
from spectrim.engines.stream import Call
from spectrim.errors import UsageError
from spectrim.linalg import curvature
from spectrim.linalg.factor import decompose
from spectrim.linalg.fallback import listening
from spectrim.linalg.metric import root_of
from spectrim.models.walk import find_layers
from spectrim.nn.scored import ScoredLinear
from spectrim.registry import make_method
from spectrim.stats import Stat
from tiny_models import tiny, token_ids

IDS = token_ids(6, 10)
EVERYTHING = frozenset({Stat.GRAM, Stat.MEAN, Stat.MEAN_ABS, Stat.OUTPUT_GRAD, Stat.FISHER})
ARCHITECTURES = ("llama-gqa-bias", "gpt2", "opt", "phi3")


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bf16, where the CPU has them, would hide errors of a per cent."""
    for module in (whole, measure_blocks):
        monkeypatch.setattr(module, "autocast", lambda _device: nullcontext())


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits whole."""
    for module in (way, recompute):
        monkeypatch.setattr(module, "fits_whole", lambda *_: False)


def off_by(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_statistics_are_those_of_all_layers_at_once(architecture: str, batch_size: int) -> None:
    model, needs = tiny(architecture), EVERYTHING
    walk = find_layers(model)
    wanted = measure(model, walk, IDS, needs, batch_size=batch_size, gradient_windows=3, seed=5)
    shelf = StatsShelf(torch.device("cpu"))
    measure_blocks.measure_blocks(model, walk, IDS, needs, shelf, batch_size=batch_size, gradient_windows=3, seed=5)
    assert [*shelf] == [la.name for la in walk.layers]
    for name, own in wanted.items():
        assert shelf[name].tokens == own.tokens
        for key, value in own.measured().items():
            assert off_by(shelf[name].measured()[key], value) < 1e-5, (name, key)


@pytest.mark.parametrize(("room", "again"), [(0, 3), (3, 2), (4, 1), (9, 0)])
def test_blocks_whose_states_are_kept_are_not_passed_again(
    room: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 blocks the states before 0 and 3 are kept in any case."""
    model, needs = tiny("llama", num_hidden_layers=5), frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
    walk, run = find_layers(model), Relay.run
    wanted = measure(model, walk, IDS[:3], needs, gradient_windows=3, seed=5)
    passed: list[int] = []
    monkeypatch.setattr(measure_blocks, "_room_for", lambda _: room)
    monkeypatch.setattr(Relay, "run", lambda self, *given: (passed.append(given[0]), run(self, *given))[1])
    monkeypatch.setattr(Relay, "check", lambda _: None)
    shelf = StatsShelf(torch.device("cpu"))
    measure_blocks.measure_blocks(model, walk, IDS[:3], needs, shelf, batch_size=3, gradient_windows=3, seed=5)
    assert len(passed) == 5 + again + 5
    for name, own in wanted.items():
        for key, value in own.measured().items():
            assert off_by(shelf[name].measured()[key], value) < 1e-5, (name, key)


@pytest.mark.parametrize(("blocks", "stride"), [(1, 1), (5, 3), (32, 6), (33, 6), (80, 9)])
def test_states_that_are_made_again_find_those_of_later_blocks_gone(blocks: int, stride: int) -> None:
    fewest = len(range(0, blocks, stride))
    for room in range(blocks + 3):
        kept = measure_blocks.kept_before(blocks, stride, room)
        assert {*range(0, blocks, stride)} <= kept <= {*range(blocks)}
        assert len(kept) == min(blocks, max(fewest, room))
        stop, most = blocks, 0
        for start in sorted(kept, reverse=True):  # as `backward` goes
            most = max(most, len([b for b in kept if b < start]) + stop - start)
            stop = start
        assert most <= max(len(kept), 2 * stride - 1)


def test_what_there_is_room_for_is_counted_in_states(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)]
    assert measure_blocks._room_for(states) == 0  # a CPU's memory is not ours to fill
    each = sum(state.nbytes for state in states)
    monkeypatch.setattr(measure_blocks, "room_left", lambda _: 10 * each + 1)
    assert measure_blocks._room_for(states) == 10 - measure_blocks.SPARE
    assert measure_blocks._room_for([]) == 0


def test_a_share_is_taken_once_however_often_a_measurement_starts_again() -> None:
    model, needs = tiny("llama"), frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
    walk, other = find_layers(model), token_ids(6, 10, seed=3)
    first, second = (measure(model, walk, ids, needs, seed=s) for s, ids in ((0, IDS), (1, other)))
    shelf = StatsShelf(torch.device("cpu"))
    told = {"batch_size": 4, "gradient_windows": 6}
    measure_blocks.measure_blocks(model, walk, IDS, needs, shelf, seed=0, again=0, **told)
    for _ in range(2):
        measure_blocks.measure_blocks(model, walk, other, needs, shelf, seed=1, again=1, share=0.5, **told)
    for name in first:
        wanted = first[name].blend(second[name])
        assert shelf[name].tokens == wanted.tokens
        assert off_by(shelf[name].get(Stat.GRAM), wanted.get(Stat.GRAM)) < 1e-5
        assert off_by(shelf[name].get(Stat.OUTPUT_GRAD), wanted.get(Stat.OUTPUT_GRAD)) < 1e-5


def test_layers_that_share_an_input_share_the_tensor() -> None:
    model = tiny("llama")
    walk = find_layers(model)
    shelf = StatsShelf(torch.device("cpu"))
    measure_blocks.measure_blocks(
        model, walk, IDS, frozenset({Stat.GRAM}), shelf, batch_size=2, gradient_windows=0, seed=0
    )
    q, k = (shelf[f"model.layers.0.self_attn.{which}_proj"].get(Stat.GRAM) for which in "qk")
    assert q is k
    assert len(shelf.shelf.kept) == 4 * len(walk.block_names)  # q k v; o; gate up; down


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("soco", {"steps": 0, "coupling": "none", "newton": 1}),
        ("two-sided", {"coupling": "none", "propagate": 0.0}),
        ("svd-llm", {}),
        ("asvd", {}),
        ("svd", {}),
        ("afm", {}),
    ],
    ids=str,
)
def test_the_result_is_that_of_all_layers_at_once(
    method: str, options: dict[str, object], request: pytest.FixtureRequest
) -> None:
    configured = make_method(method, options=options)
    allowed = 5e-3 if options.get("newton") else 2e-4  # the gradient of Newton's step knows components in 16 bits
    wanted = compress_model(tiny("llama"), configured, 0.6, IDS, gradient_windows=4, seed=2)
    request.getfixturevalue("too_large")
    assert not way.way_of(torch.device("cpu"), wanted.walk, configured).whole
    found = compress_model(tiny("llama"), configured, 0.6, IDS, gradient_windows=4, seed=2)
    assert found.plan == wanted.plan
    assert found.warnings == wanted.warnings
    for name, own in wanted.placed.items():
        assert off_by(found.placed[name].dense(), own.dense()) < allowed, name


def test_scores_learned_on_components_in_16_bits_are_those_learned_on_all_of_them(
    request: pytest.FixtureRequest,
) -> None:
    configured = make_method("soco", options={"steps": 6, "coupling": "none", "batch_size": 2})
    wanted = compress_model(tiny("llama"), configured, 0.6, IDS, gradient_windows=4, seed=2)
    request.getfixturevalue("too_large")
    found = compress_model(tiny("llama"), configured, 0.6, IDS, gradient_windows=4, seed=2)
    assert wanted.learned is not None
    assert found.learned is not None
    assert found.learned.losses == pytest.approx(wanted.learned.losses, rel=2e-2)
    for name, own in wanted.placed.items():
        # What is stored comes from the accurate components: only the scores know of the 16 bits.
        assert off_by(found.placed[name].dense(), own.dense()) < 5e-3, name


@pytest.mark.parametrize("options", [{"steps": 6, "batch_size": 2}, {"steps": 0, "newton": 1}], ids=str)
def test_a_run_that_goes_on_puts_its_spectra_where_the_first_had_them(
    too_large: None, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = make_method("soco", options={"coupling": "none", **options})
    own, seen = pipeline.energies_in, list[SpectraShelf]()

    def looked_at(spectra: SpectraShelf) -> dict[str, Tensor]:
        seen.append(spectra)
        return own(spectra)

    monkeypatch.setattr(pipeline, "energies_in", looked_at)
    checkpoint = MemoryCheckpoint(closed=True)
    told = {"gradient_windows": 4, "seed": 2, "checkpoint": checkpoint}
    wanted = compress_model(tiny("llama"), configured, 0.6, IDS, **told)
    assert "closed form" in checkpoint.states
    found = compress_model(tiny("llama"), configured, 0.6, IDS, **told)
    first, second = seen
    assert isinstance(second, SpectraShelf)
    assert second.shelf.on_host == first.shelf.on_host == (options["steps"] != 0)
    assert second.shelf.kept.keys() == first.shelf.kept.keys()
    assert {tensor.dtype for tensor in second.shelf.kept.values()} == {torch.float32}
    assert all(energy.dtype == torch.float64 for energy in second.energies.values())
    assert found.plan == wanted.plan
    for name, placed in wanted.placed.items():
        assert torch.equal(found.placed[name].dense(), placed.dense()), name


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_anchored_weight_is_the_weight_whose_components_it_holds_in_16_bits(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator, dtype=torch.float64)
    stats = torch.randn(16, 40, generator=generator, dtype=torch.float64)
    spectrum = decompose(weight, right=root_of(stats @ stats.mT))
    wide, narrow = ScoredLinear(spectrum, None), ScoredLinear(spectrum, None, narrow=True)
    for layer in (wide, narrow):
        layer.mask[10:] = 0
        layer.scores.data[3] = 1.2
    narrow.settle(spectrum)
    for layer in (wide, narrow):
        layer.scores.data[:5] += 0.1
        layer.mask[8] = 1 - share * 2
    assert off_by(narrow.weight_now(), wide.weight_now()) < 1e-2
    gradients = []
    for layer in (wide, narrow):
        layer(torch.ones(2, 16)).square().sum().backward()
        assert layer.scores.grad is not None
        gradients.append(layer.scores.grad)
    assert off_by(gradients[1], gradients[0]) < 3e-2
    assert off_by(narrow.kept(spectrum).left, wide.kept().left) < 1e-6


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(
    too_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = make_method("soco", preset="fast")
    wanted = compress_model(tiny("llama"), configured, 0.6, IDS, gradient_windows=4, seed=2)
    own, begun = Relay.run, []

    def small_device(self: Relay, block: int, hidden: Tensor, call: Call) -> Tensor:
        begun.append(len(hidden))
        if len(begun) > 9 and len(hidden) > 2:  # not at once: some blocks are finished by then
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, block, hidden, call)

    monkeypatch.setattr(Relay, "run", small_device)
    with listening() as fallbacks:
        found = compress_model(tiny("llama"), configured, 0.6, IDS, gradient_windows=4, seed=2)
    assert [(f.operation, f.way) for f in fallbacks] == [("calibrate", "batches of 2")]
    assert found.plan == wanted.plan
    for name, replaced in wanted.placed.items():
        assert off_by(found.placed[name].dense(), replaced.dense()) < 1e-4, name


@pytest.mark.parametrize("n", [1, 5, 8, 13])
def test_a_packed_symmetric_matrix_comes_back(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "STRIP", 4)
    draw = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    packed = pack_symmetric(draw + draw.mT)
    assert packed.numel() == sum(min(4, n - low) * (n - low) for low in range(0, n, 4))
    assert torch.equal(unpack_symmetric(packed, n), draw + draw.mT)


@pytest.mark.parametrize(("rows", "width"), [(7, 5), (40, 12), (33, 13)])
@pytest.mark.parametrize(("crossed", "upper"), [(False, False), (False, True), (True, False)])
def test_products_in_strips_are_the_product(
    rows: int, width: int, crossed: bool, upper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, with its one product replaced by an exact one."""
    monkeypatch.setattr(curvature, "TENSOR_CHUNK", 16)
    monkeypatch.setattr(curvature, "STRIP", 4)
    monkeypatch.setattr(curvature, "ALIGNED", 4)
    monkeypatch.setattr(curvature, "_product_in_float32", lambda a, b: a.float() @ b.float())
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, width, generator=generator).bfloat16() for _ in range(2))
    total = torch.ones(width, width, dtype=torch.float64)
    for part in (slice(0, 5), slice(5, None)):
        second = (y if crossed else x)[part]
        curvature._add_gram_of_bf16(total, x[part], second, symmetric=not crossed, upper=upper)
    if upper:
        assert not torch.equal(total, total.mT)
        curvature.mirror(total)
    assert off_by(total, 1 + x.double().mT @ (y if crossed else x).double()) < 1e-6


@pytest.mark.parametrize(
    ("windows", "length", "given"), [(256, 512, 256), (8, 512, 8), (512, 512, 256), (256, 2048, 64), (2048, 512, 512)]
)
def test_gradients_come_from_as_many_tokens_as_are_enough(windows: int, length: int, given: int) -> None:
    assert default_gradient_windows(windows, torch.device("cuda"), length) == given
    assert default_gradient_windows(windows, torch.device("cpu"), length) == max(1, windows // 4)


def test_small_models_run_as_before() -> None:
    model = tiny("llama")
    assert way.way_of(torch.device("cpu"), find_layers(model), make_method("soco", preset="fast")).whole


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_relay_leaves_no_trace(architecture: str) -> None:
    model = tiny(architecture)
    relay = Relay(model, find_layers(model))
    relay.check()
    hidden, calls = relay.enter(IDS)
    assert len(calls) == len(relay.blocks)
    assert hidden.shape[:2] == IDS.shape
    assert all("forward" not in vars(block) for block in relay.blocks)


def test_a_model_whose_blocks_hand_on_more_is_refused() -> None:
    model = tiny("llama")

    class Counting(nn.Module):
        """Stands for a block that reads what others left: it counts how often any of them ran."""

        ran = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
            Counting.ran += 1
            return self.inner(hidden, *args, **kwargs).roll(Counting.ran, -1)

    model.model.layers[1] = Counting(model.model.layers[1])
    with pytest.raises(UsageError, match="more than hidden states"):
        Relay(model, find_layers(model)).check()


def test_a_shelf_writes_over_what_has_the_same_shape_and_keeps_no_view() -> None:
    shelf = Shelf(torch.device("cpu"))
    given = torch.ones(2, 3, dtype=torch.float64)
    shelf.put("a", given[:, :2])
    first = shelf.kept["a"]
    given.zero_()
    assert shelf.get("a").tolist() == [[1, 1], [1, 1]]
    shelf.put("a", given[:, :2])
    assert shelf.kept["a"] is first
    assert shelf.get("a").dtype == torch.float64
    assert first.untyped_storage().nbytes() == 16
