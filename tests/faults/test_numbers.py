"""Numbers that go wrong during a run, through the command line: NaN, solvers that fail, memory that runs out, quality.

What is injected: torch's own solvers and forward passes raise, or return garbage, at a chosen moment.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from command_line import PLAIN, VOCABULARY, call, change_weights, hashes, small_model, small_text
from spectrim import job, reloaded
from spectrim.engines.layerwise import check_weights, refuse_large_sides
from spectrim.engines.loop import Group, Training, train
from spectrim.errors import NumericalError, ResourceError, UsageError
from spectrim.evaluate.language import evaluate
from spectrim.linalg.fallback import listening
from spectrim.memory import Batch, is_out_of_memory
from spectrim.models.walk import Layer, Walk, find_layers
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

pytestmark = pytest.mark.faults

GPU_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
CPU_SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: not enough memory: you tried to allocate"


@pytest.fixture(scope="module", autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


def compress(model: Path, out: Path, *options: object, code: int = 0) -> Any:
    answer = call("compress", model, "--out", out, *PLAIN, "--json", *options)
    assert answer.code == code, answer.err
    return answer


# ---- NaN in weights


@pytest.mark.fault(44)
@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_layers_that_are_not_finite_are_copied_unchanged_when_asked(method: str, model: Path, tmp_path: Path) -> None:
    """In the last block's last layer, so that statistics of the others stay finite."""
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(model, name, lambda tensor: tensor.view(-1)[5:7].fill_(torch.nan))
    refused = call("compress", model, "--out", tmp_path / "out", *PLAIN, "--method", method)
    assert refused.code == 5
    assert f"{name}: 2 of 1,536 values are NaN or Inf; none is allowed" in refused.message
    assert "--allow-nonfinite skip" in refused.message
    report = compress(model, tmp_path / "out", "--method", method, "--allow-nonfinite", "skip").json
    says = f"{name}: 2 of 1,536 values are NaN or Inf"
    assert report["warnings"][0] == f"{says}: the layer is copied unchanged, and the budget is that of the others"
    assert [(row["name"], row["why"]) for row in report["untouched"]][-1] == (name.removesuffix(".weight"), says)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before[name].view(torch.int32), after[name].view(torch.int32))
    assert (
        name.removesuffix(".weight")
        not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    )


@pytest.mark.fault(44, 45)
def test_skipping_a_layer_does_not_let_its_nan_into_the_statistics_of_others(model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.view(-1)[:1].fill_(torch.inf))
    answer = compress(model, tmp_path / "out", "--method", "svd-llm", "--allow-nonfinite", "skip", code=5)
    assert (
        "model.layers.0.mlp.down_proj: the inputs are not finite in the batch that starts at calibration window 0"
        in (answer.message)
    )
    assert "bfloat16 and float32 reach further than float16" in answer.message
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(44)
def test_a_model_of_nothing_but_nan_is_refused_even_then(model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.layers", lambda tensor: tensor.fill_(torch.nan))
    answer = compress(model, tmp_path / "out", "--method", "svd", "--allow-nonfinite", "skip", code=5)
    assert "all 14 layers hold NaN or Inf; nothing is left to compress" in answer.message


@pytest.mark.fault(44, 68)
def test_another_word_than_refuse_or_skip_is_refused(model: Path, tmp_path: Path) -> None:
    message = compress(model, tmp_path / "out", "--allow-nonfinite", "skipp", code=2).message
    assert "allow_nonfinite: 'skipp' is not supported; did you mean 'skip'?" in message


@pytest.mark.fault(44)
def test_a_bias_counts_as_part_of_its_layer() -> None:
    model = tiny("qwen2")
    walk = find_layers(model)
    with torch.no_grad():
        model.get_submodule(walk.layers[0].name).bias[3] = torch.inf
    with pytest.raises(NumericalError, match=r"q_proj\.bias: 1 of 32 values are NaN or Inf"):
        check_weights(model, walk)
    finite, says = check_weights(model, walk, "skip")
    assert [layer.name for layer in finite.layers] == [layer.name for layer in walk.layers[1:]]
    assert len(says) == 1


@pytest.mark.fault(44)
@pytest.mark.parametrize("spoil", [None, torch.nan])
def test_logits_that_were_finite_must_be_so_after_the_reload(spoil: float | None, model: Path, tmp_path: Path) -> None:
    """`--allow-nonfinite` allows the numbers that were none before, and no others."""
    from spectrim.models.load import load_dense, resolve

    mock.patch.stopall()
    dense = load_dense(resolve(str(model)), torch.device("cpu"))
    with torch.no_grad():
        there = dense(input_ids=torch.arange(16)[None] * 7919 % VOCABULARY).logits
    if spoil is not None:
        there[0, 0, 0] = spoil
    with mock.patch.object(reloaded, "logits_elsewhere", return_value=there):
        if spoil is None:
            assert REAL_RELOAD(model, dense, allow_nonfinite=True) == 0.0
        else:
            with pytest.raises(NumericalError, match="not finite"):
                REAL_RELOAD(model, dense, allow_nonfinite=True)


REAL_RELOAD = job.reload_difference


@pytest.mark.fault(46)
@pytest.mark.parametrize("method", ["svd-llm", "asvd", "two-sided"])
def test_inputs_that_never_fire_are_reported_and_the_rest_is_compressed(
    method: str, model: Path, tmp_path: Path
) -> None:
    """A norm whose first four weights are 0 kills four inputs of q, k and v in the last block."""
    change_weights(model, "model.layers.1.input_layernorm", lambda tensor: tensor[:4].fill_(0))
    answer = compress(model, tmp_path / "out", "--method", method)
    says = (
        "3 layers have inputs that are 0 for every calibration token (first model.layers.1.self_attn.q_proj: 4 of 32); "
        "what they do to other text is not kept"
    )
    assert says in answer.json["warnings"]
    sizes = compress(model, tmp_path / "sizes", "--method", "svd-llm", "--any-size", "--anchors", "0.8,0.6")
    assert says in sizes.json["warnings"]


# ---- solvers


def sometimes(
    real: Callable[..., Any], wrong: Callable[[Any], Any], chosen: Callable[[int], bool]
) -> Callable[..., Any]:
    calls = iter(range(10**9))
    return lambda *a, **k: wrong(real(*a, **k)) if chosen(next(calls)) else real(*a, **k)


def not_converged(_: Any) -> Any:
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")


@pytest.mark.fault(51)
def test_a_solver_that_fails_now_and_then_is_counted_and_changes_little(model: Path, tmp_path: Path) -> None:
    plain = compress(model, tmp_path / "plain", "--method", "svd").json
    assert plain["fallbacks"] == []
    flaky = sometimes(torch.linalg.eigh, not_converged, lambda call: call % 5 == 2)
    with mock.patch.object(torch.linalg, "eigh", flaky):
        report = compress(model, tmp_path / "out", "--method", "svd").json
    assert len(report["fallbacks"]) == 3
    assert {row["way"] for row in report["fallbacks"]} == {"other driver, float64, cpu"}
    assert any("eigh: 3 times done with other driver, float64, cpu" in line for line in report["warnings"])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    for name in (n for n in one if n.endswith("V.weight")):
        both = [t[name.replace("V.", "U.")] @ t[name] for t in (one, other)]
        assert torch.allclose(*both, atol=1e-5), name


@pytest.mark.fault(51)
def test_a_solver_that_always_fails_ends_the_run_with_the_matrix_saved(model: Path, tmp_path: Path) -> None:
    before = hashes(model)
    with (
        mock.patch.object(torch.linalg, "eigh", sometimes(torch.linalg.eigh, not_converged, lambda _: True)),
        mock.patch.object(torch.linalg, "svd", sometimes(torch.linalg.svd, not_converged, lambda _: True)),
    ):
        message = compress(model, tmp_path / "out", "--method", "svd-llm", code=5).message
    path = tmp_path / "out.unsolved.safetensors"
    assert "model.layers.0.self_attn.q_proj: the solver failed on its 32 x 32 weight (svd-llm)" in message
    assert "failed on every way" in message
    assert f"The matrix is kept in {path}" in message.replace("\n", "")
    matrix = load_file(path)["matrix"]
    assert matrix.shape == (32, 32)
    assert bool(torch.isfinite(matrix).all())
    # What was measured may be kept too, where that took long enough to be worth it.
    assert {p.name for p in tmp_path.iterdir()} - {"out.resume"} == {"model", "out.unsolved.safetensors"}
    assert hashes(model) == before


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    ("method", "outputs", "inputs", "side"),
    [("svd-llm", 8, 40_000, 40_000), ("two-sided", 40_000, 8, 40_000), ("svd", 40_000, 50_000, 40_000)],
)
def test_matrices_beyond_what_solvers_count_are_refused_in_preflight(
    method: str, outputs: int, inputs: int, side: int
) -> None:
    layer = Layer(name="m.0.up", block=0, outputs=outputs, inputs=inputs, has_bias=False)
    walk = Walk(layers=(layer,), block_names=("m.0",), untouched=())
    with pytest.raises(UsageError, match=rf"m\.0\.up: method {method} decomposes a {side:,} x {side:,} matrix"):
        refuse_large_sides(make_method(method), walk)
    refuse_large_sides(make_method("asvd"), Walk(layers=(Layer(
        name="m", block=0, outputs=8, inputs=40_000, has_bias=False),), block_names=("m",), untouched=()))  # fmt: skip


# ---- memory


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    ("error", "method"),
    [
        (torch.OutOfMemoryError(GPU_SAYS), "svd-llm"),
        (RuntimeError(CPU_SAYS), "two-sided"),
        (MemoryError(), "svd-llm"),
        (torch.OutOfMemoryError(GPU_SAYS), "soco"),
    ],
)
def test_batches_are_halved_until_they_fit_and_the_result_is_the_same(
    error: Exception, method: str, model: Path, tmp_path: Path
) -> None:
    """Batches of more than one window find no memory, in the forward pass of the second layer's second matrix."""
    text = ("--calib", small_text(tmp_path / "text.txt"), "--method", method, "--set", "steps=2")
    text = text if method == "soco" else text[:-2]
    plain = compress(model, tmp_path / "plain", *text).json
    real = torch.nn.functional.linear

    def scarce(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.shape[0] > 1 and x.shape[-1] == 48:
            raise error
        return real(x, *rest)

    with mock.patch.object(torch.nn.functional, "linear", scarce):
        report = compress(model, tmp_path / "out", *text).json
    ways = [(row["operation"], row["size"], row["way"]) for row in report["fallbacks"]]
    assert ways[:2] == [("calibrate", "4 windows", "batches of 2"), ("calibrate", "2 windows", "batches of 1")]
    assert any(line.startswith("calibrate: 1 times done with batches of 2 (4 windows; ") for line in report["warnings"])
    if method == "soco":
        assert any(row["operation"] == "learn scores" for row in report["fallbacks"])
        assert report["learning"]["losses"] == pytest.approx(plain["learning"]["losses"], rel=0.05)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    same_ranks = {name: tuple(t.shape) for name, t in one.items()} == {n: tuple(t.shape) for n, t in other.items()}
    assert same_ranks or method == "soco"


@pytest.mark.fault(59)
def test_with_one_window_too_many_the_run_ends_with_advice(model: Path, tmp_path: Path) -> None:
    with mock.patch.object(torch.nn.functional, "linear", side_effect=torch.OutOfMemoryError(GPU_SAYS)):
        message = compress(model, tmp_path / "out", "--method", "svd-llm", code=4).message
    assert "out of memory" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(59)
def test_the_statistics_and_figures_do_not_depend_on_the_batch_that_fits() -> None:
    model, ids = tiny("llama"), token_ids(8)
    whole = evaluate(model, ids, batch_size=8)
    real, sizes = torch.nn.functional.linear, []

    def scarce(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(x.shape[0])
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError(GPU_SAYS)
        return real(x, *rest)

    with mock.patch.object(torch.nn.functional, "linear", scarce), listening() as heard:
        parts = evaluate(model, ids, batch_size=8)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert [f.way for f in heard] == ["batches of 4", "batches of 2"]
    assert max(sizes) == 8


@pytest.mark.fault(59)
def test_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    def losses_when(largest: int) -> tuple[list[float], torch.Tensor]:
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

        def loss(x: torch.Tensor) -> torch.Tensor:
            if len(x) > largest:
                raise torch.OutOfMemoryError(GPU_SAYS)
            return (x * weight).sum(1).square().mean()

        training = Training(
            stage="s", label="learn", says="s", advice="", loss=loss, steps=5, batch_size=6,
            groups=[Group(parameters={"w": weight}, peak=0.1)], optimizer=torch.optim.SGD,
        )  # fmt: skip
        rows = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
        return train(training, rows), weight.detach()

    (plain, at), (parts, there) = losses_when(6), losses_when(1)
    assert parts == pytest.approx(plain, rel=1e-5)
    assert torch.allclose(at, there, rtol=1e-5)
    with pytest.raises(ResourceError, match="learn: out of memory with one window at a time"):
        losses_when(0)


@pytest.mark.fault(59)
def test_what_is_no_lack_of_memory_is_not_tried_again() -> None:
    tries = []

    def work(size: int) -> None:
        tries.append(size)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Batch(8).run("x", work)
    assert tries == [8]
    assert not is_out_of_memory(ValueError("not enough memory"))
