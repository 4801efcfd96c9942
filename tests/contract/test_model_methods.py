"""What every method that treats the model as a whole must do, whatever its layers become.

A method of the tests' own, which keeps the largest rows of each weight in a codec of its own, goes through the same.
"""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spectrim.engines.clock import timed
from spectrim.engines.learned import skeleton
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.integrations.folder import finalise, write_folder
from spectrim.integrations.transformers import make_dense
from spectrim.job import stored_in
from spectrim.linalg.bits import PER_NUMBER
from spectrim.linalg.knapsack import has_solver
from spectrim.method import Method, MethodInfo
from spectrim.model_method import Job, ModelMethod
from spectrim.models.walk import weight_of
from spectrim.nn.codecs import CODECS, StoredLinear, codec_class
from spectrim.registry import MODEL_METHODS, make_method
from spectrim.stats import Stat
from spectrim.store import open_checkpoint
from tiny_models import VOCABULARY, assert_same_state, logits_of, state_of, tiny, token_ids

KEEP = 0.75
OPTIONS: dict[str, dict[str, Any]] = {
    "lpaf": {"prune_steps": 4, "mixed_steps": 4, "batch_size": 4},
    "rtn": {"bits": 8, "group_size": 8},
    "gptq": {"bits": 8, "group_size": 8, "search": False},
    "trellis": {"window": 8},
    "eora": {"base": "gptq4", "group_size": 8, "search": False},
    "squeezellm": {"bits": 3, "outliers": 0.02, "sensitive": 0.01},
    "spqr": {"bits": 8, "group_size": 8, "statistic_bits": 4, "outliers": 0.09, "threshold": 3e-5},
    "gqsa": {"bits": 8, "group_size": 8, "sparsity": 0.25, "search": False},
    "int2.1": {"base": "gptq4", "group_size": 8, "search": False, "steps": 4, "batch_size": 4},
    "lq-lora": {"rank_bits": 2.0, "iterations": 3, "steps": 4, "batch_size": 4},
}
"""Options for the tiny model, of methods whose defaults are for larger ones."""
ARCHITECTURE: dict[str, str] = {}
"""Of the tiny model; llama-gqa-bias unless said."""


class RowsLinear(StoredLinear):
    """The first R rows of a weight in a given order; the other outputs are 0."""

    codec = "rows"
    places: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.rows = nn.Parameter(torch.zeros(rank, inputs, device=device, dtype=dtype))
        self.register_buffer("places", torch.zeros(rank, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.add_guard(device, dtype)

    @classmethod
    def from_entry(cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device=None, dtype=None) -> Self:
        if entry["rank"] > outputs:
            raise ValueError(f"rank {entry['rank']}; the layer has {outputs} rows")
        return cls(inputs, outputs, entry["rank"], bias=entry["bias"], device=device, dtype=dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        bias = {"bias": (self.out_features,)} if self.has_bias else {}
        return {"rows": (self.rank, self.in_features), "places": (self.rank,), **bias}

    def after_load(self) -> None:
        if bool((self.places < 0).any()) or bool((self.places >= self.out_features).any()):
            raise ValueError("a row's place is outside the layer")

    def dense_weight(self) -> Tensor:
        weight = torch.zeros(self.out_features, self.in_features)
        return weight.index_copy(0, self.places.long(), self.rows.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.rows)
        y = y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.places.long(), y)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, kw_only=True)
class LargestRows(ModelMethod):
    """Keep the rows that matter most for the layer's outputs."""

    info: ClassVar = MethodInfo(name="rows", family="tests", paper="none", promise="none")
    needs: ClassVar = frozenset({Stat.GRAM})
    codecs: ClassVar = ("rows",)

    spare: int = 0
    fill: float = 1.0

    def compress(self, job: Job):
        model = skeleton(job.dense)
        for layer in job.walk.layers:
            module = model.get_submodule(layer.name)
            weight = weight_of(module).detach()
            rank = int(job.keep * layer.weight_numbers / (layer.inputs + 1)) + self.spare
            size = ((weight.double() @ job.stats[layer.name].get(Stat.GRAM)) * weight).sum(1)
            kept = size.topk(min(rank, layer.outputs)).indices.sort().values
            new = RowsLinear(layer.inputs, layer.outputs, len(kept), bias=module.bias is not None)
            new.rows.data.copy_(weight[kept] * self.fill)
            new.places.copy_(kept)
            if new.bias is not None:
                new.bias.data.copy_(module.bias)
            model.set_submodule(layer.name, new)
        return model


@pytest.fixture(autouse=True)
def rows_codec(monkeypatch):
    monkeypatch.setitem(CODECS, "rows", f"{__name__}:RowsLinear")


def method_of(name: str) -> Method:
    return LargestRows() if name == "rows" else make_method(name, None, dict(OPTIONS.get(name, {})))


def dense_of(name: str):
    return tiny(ARCHITECTURE.get(name, "llama-gqa-bias"))


def made(name: str, keep: float = KEEP, **options: Any) -> tuple[Any, Outcome]:
    dense = dense_of(name)
    method = LargestRows(**options) if name == "rows" else method_of(name)
    return dense, compress_model(dense, method, keep, token_ids(8), seed=3)


@dataclass(frozen=True)
class Made:
    """A dense model, what it and its surroundings were before, and what was made of it, which no test may change."""

    dense: Any
    before: dict[str, Any]
    outcome: Outcome
    folder: Path


@functools.cache
def once(name: str, where: Path) -> Made:
    """One run for all tests that only look at it."""
    dense = dense_of(name)
    before, random = state_of(dense), torch.get_rng_state()
    outcome = compress_model(dense, method_of(name), KEEP, token_ids(8), seed=3)
    assert torch.equal(random, torch.get_rng_state()), "the global random state was changed"
    folder = where / name
    write_folder(folder, finalise(outcome, torch.float32, base_model="tiny"), None)
    return Made(dense, before, outcome, folder)


@pytest.fixture(scope="module")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(name: str, _runs: Path, rows_codec: None) -> Made:
    return once(name, _runs)


def loaded(run: Made):
    return AutoModelForCausalLM.from_pretrained(run.folder)


def written(outcome: Outcome, folder: Path):
    write_folder(folder, finalise(outcome, torch.float32, base_model="tiny"), None)
    return AutoModelForCausalLM.from_pretrained(folder)


NEEDS_SOLVER = {"lq-lora"}
"""Methods that need the extra `ilp`."""
every_name = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name in NEEDS_SOLVER and not has_solver(), reason="SciPy (extra `ilp`) is not installed"
            ),
        )
        for name in ["rows", *MODEL_METHODS]
    ],
)


@every_name
def test_the_dense_model_is_left_alone(run):
    """Its numbers, the flags of its parameters, its modules and their hooks; and the global random state (`once`)."""
    assert_same_state(run.before, state_of(run.dense))


@every_name
def test_the_result_can_be_pickled(run, tmp_path):
    torch.save(run.outcome.model, tmp_path / "model.pt")
    ids = token_ids(2)
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(again, ids), logits_of(run.outcome.model, ids))


@every_name
def test_numbers_that_were_not_finite_elsewhere_may_stay(name):
    dense = dense_of(name)
    with torch.no_grad():
        dense.get_input_embeddings().weight[VOCABULARY - 1, 0] = float("nan")
    ids = token_ids(8).clamp(max=VOCABULARY - 2)
    if name == "slicegpt":  # it turns the embedding
        with pytest.raises(NumericalError, match="embed_tokens"):
            compress_model(dense, method_of(name), KEEP, ids, nonfinite="skip")
        return
    if dense.config.tie_word_embeddings:
        dense.set_output_embeddings(tiny("llama-gqa-bias").get_output_embeddings())
    compress_model(dense, method_of(name), KEEP, ids, nonfinite="skip")


@every_name
def test_the_same_again_gives_the_same(name, run):
    first, second = run.outcome.model.state_dict(), made(name)[1].model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_name
def test_what_is_written_is_what_was_made_and_within_the_budget(run):
    outcome = run.outcome
    ids = token_ids(2)
    assert torch.allclose(logits_of(loaded(run), ids), logits_of(outcome.model, ids), atol=1e-5)
    names = {layer.name for layer in outcome.walk.layers}
    headers = open_checkpoint(run.folder).tensors
    stored = [info for key, info in headers.items() if any(key.startswith(f"{n}.") for n in names)]
    assert sum(info.numel for info in stored) == outcome.plan.numbers_after
    unit = outcome.method.budget_unit
    counted = sum(stored_in(info, unit) for info in stored)
    allowed = KEEP * PER_NUMBER[unit] * outcome.plan.numbers_before
    assert 0.5 * allowed < counted <= allowed  # nobody gives the budget away


@every_name
def test_what_was_loaded_saves_the_same_again(run, tmp_path):
    loaded(run).save_pretrained(tmp_path / "two")
    first, second = (load_file(folder / "model.safetensors") for folder in (run.folder, tmp_path / "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_name
def test_stored_layers_compute_their_dense_weight_and_the_model_can_be_made_dense(run):
    model = loaded(run)
    for path, module in model.named_modules():
        if not isinstance(module, StoredLinear):
            continue
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(1))
        bias = getattr(module, "bias", None)
        expected = nn.functional.linear(x, module.dense_weight().float(), bias)
        assert torch.allclose(module(x), expected, atol=1e-4), path
        assert {k: tuple(t.shape) for k, t in module.state_dict().items() if t.numel()} == module.shapes(), path
    ids = token_ids(2)
    before = logits_of(model, ids)
    assert torch.allclose(logits_of(make_dense(model), ids), before, atol=1e-4)
    assert not any(isinstance(module, StoredLinear) for module in model.modules())


@every_name
def test_options_round_trip(name):
    method = method_of(name)
    config = method.to_config()
    assert config.pop("method") == method.info.name
    assert type(method).from_config(config) == method


@every_name
def test_codecs_are_those_that_are_named(name, run):
    method = method_of(name)
    assert isinstance(method, ModelMethod)
    found = {m.codec for m in run.outcome.model.modules() if isinstance(m, StoredLinear)}
    assert found <= set(method.codecs)
    assert all(codec_class(codec).codec == codec for codec in method.codecs)


def test_seconds_of_a_stage_do_not_count_those_inside_it():
    clock: dict[str, float] = {}
    with timed(clock, "outer"), timed(clock, "inner"):
        time.sleep(0.05)
    assert clock["inner"] >= 0.05
    assert 0 <= clock["outer"] < 0.04


# ---------- what the engine refuses


def test_more_than_the_budget_is_refused():
    with pytest.raises(NumericalError, match=r"rows stores .* keep 0.75 allows"):
        made("rows", spare=3)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(NumericalError, match=r"rows: rows made NaN or Inf|rows made NaN or Inf"):
        made("rows", fill=float("inf"))


def test_recovery_of_layers_without_factors_is_refused():
    with pytest.raises(UsageError, match=r"its layers have none \(rows\)"):
        compress_model(tiny("llama"), LargestRows(), KEEP, token_ids(8), recovery=("kl:2",))


def test_skipped_layers_are_refused():
    dense = tiny("llama")
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"cannot leave out 1 layers .*layers.0.mlp.up_proj"):
        compress_model(dense, LargestRows(), KEEP, token_ids(8), nonfinite="skip")


def edited(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_layer_may_refuse_what_was_loaded(tmp_path):
    written(made("rows")[1], tmp_path / "out")
    edited(tmp_path / "out", lambda t: t["model.layers.1.mlp.up_proj.places"].fill_(1000))
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj: a row's place is outside"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_tensor_of_another_kind_of_number_is_refused(tmp_path):
    written(made("rows")[1], tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.places"
    edited(tmp_path / "out", lambda t: t.update({name: t[name].long()}))
    with pytest.raises(InputError, match=r"up_proj.places: the file holds int64, expected int32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_entry_that_does_not_fit_is_refused(tmp_path):
    written(made("rows")[1], tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace('"rank": 2', '"rank": 20000002'))
    with pytest.raises(InputError, match=r"config.json gives model.layers.\d.*rank 2000000\d+; the layer has"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_key_named_like_a_parameter_of_python_is_information(tmp_path):
    written(made("rows")[1], tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace('"tool_version"', '"self": 1, "tool_version"'))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
