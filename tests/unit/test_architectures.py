"""The whole road for every architecture and method: compress, save, plain from_pretrained, generate, multiply back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.integrations.export import export_dense
from spectrim.integrations.transformers import make_dense
from spectrim.job import Compressed
from spectrim.models.load import resolve
from spectrim.models.walk import find_layers
from spectrim.nn.linears import LowRankLinear, PivotLinear
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

KEEP = 0.6
ARCHITECTURES = (
    "llama",
    "llama-gqa-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3",
    "opt",
    "gpt-neox",
    "gpt2",
    "phi3",
    "falcon",
    "qwen3-moe",
)
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "svd": (LowRankLinear, {}),
    "two-sided": (PivotLinear, {}),
    "acip": (LowRankLinear, {"steps": 3, "batch_size": 2, "adapter_rank": 2}),
    "soco": (PivotLinear, {"steps": 3, "batch_size": 2, "project_every": 1}),
}
CASES = [(a, m) for a in ARCHITECTURES for m in METHODS]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture compressed by one method, saved and loaded again."""

    dense: PreTrainedModel
    before: dict[str, Any]  # state of the dense model before it was compressed
    method: str
    small: Compressed
    folder: Path
    loaded: PreTrainedModel
    ids: Tensor  # not those of the calibration

    @property
    def small_logits(self) -> Tensor:
        return logits_of(self.small.model, self.ids)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture, method = request.param
    dense = tiny(architecture)
    before = state_of(dense)
    small = spectrim.compress(dense, keep=KEEP, method=method, options=METHODS[method][1], calibration=token_ids())
    folder = small.save_pretrained(tmp_path_factory.mktemp("small") / "model")
    return Case(
        dense=dense,
        before=before,
        method=method,
        small=small,
        folder=folder,
        loaded=AutoModelForCausalLM.from_pretrained(folder),
        ids=token_ids(3, 12, seed=2),
    )


def stored_numbers(folder: Path, names: set[str]) -> int:
    """Numbers of the target layers, counted from the files by other means than spectrim's."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a dict
                if any(key.startswith(name + ".") for name in names):
                    total += tensors.get_tensor(key).numel()
    return total


@pytest.mark.fault(54, 56)
def test_the_budget_is_met_and_never_exceeded(case):
    walk = find_layers(case.dense)
    dense_numbers = sum(p.numel() for la in walk.layers for p in case.dense.get_submodule(la.name).parameters())
    share = stored_numbers(case.folder, {la.name for la in walk.layers}) / dense_numbers
    assert KEEP * 0.98 <= share <= KEEP
    assert share == pytest.approx(case.small.outcome.plan.keep, abs=1e-12)
    assert share == pytest.approx(case.small.report["stored"]["keep"], abs=1e-12)


def test_layers_took_the_codec_of_the_method(case):
    kind = METHODS[case.method][0]
    found = [case.loaded.get_submodule(la.name) for la in find_layers(case.dense).layers]
    low_rank = [m for m in found if isinstance(m, LowRankLinear | PivotLinear)]
    assert all(type(m) is kind for m in low_rank)
    assert len(low_rank) > len(found) / 2


def test_the_source_is_unchanged_bit_for_bit(case):
    assert_same_state(case.before, state_of(case.dense))


@pytest.mark.fault(56)
def test_nothing_is_shared_with_the_source(case):
    mine = {p.data_ptr() for p in case.small.model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in case.dense.parameters())


def test_the_working_copy_shares_what_is_not_compressed(case):
    """A run must not hold the embeddings twice."""
    layers = {la.name for la in find_layers(case.dense).layers}
    ours = dict(case.small.outcome.model.named_parameters())
    rest = [(n, p) for n, p in case.dense.named_parameters() if n.rpartition(".")[0] not in layers]
    assert rest
    assert all(ours[name] is parameter for name, parameter in rest)


@pytest.mark.fault(56, 71)
def test_plain_from_pretrained_gives_the_same_logits(case):
    assert type(case.loaded) is type(case.dense)
    torch.testing.assert_close(logits_of(case.loaded, case.ids), case.small_logits, atol=1e-5, rtol=0)


def test_compression_changed_the_logits(case):
    """Guards the other comparisons: a model that was not compressed at all would pass them."""
    change = (case.small_logits - logits_of(case.dense, case.ids)).abs().max()
    assert 1e-3 < change < 1e3


def test_a_second_save_and_load_changes_nothing(case, tmp_path):
    case.loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, case.ids), logits_of(case.loaded, case.ids))
    ours, theirs = case.loaded.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_generation_with_the_cache_equals_the_uncached_model(case):
    prompt, new = case.ids[:2, :6], 8
    out = case.loaded.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.past_key_values is not None
    assert out.sequences.shape == (2, 6 + new)
    forced = logits_of(case.loaded, out.sequences)[:, 5:-1]  # no cache, fed with what was generated
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced, atol=1e-4, rtol=1e-4)
    chosen = forced.gather(-1, out.sequences[:, 6:, None]).squeeze(-1)
    assert (forced.max(-1).values - chosen).abs().max() <= 1e-4  # greedy, up to ties


@pytest.mark.fault(56)
def test_full_keep_gives_the_dense_logits(case):
    full = spectrim.compress(
        case.dense, keep=1.0, method=case.method, options=METHODS[case.method][1], calibration=token_ids(2)
    )
    dense = logits_of(case.dense, case.ids)
    torch.testing.assert_close(logits_of(full.model, case.ids), dense, atol=1e-4, rtol=1e-4)
    assert full.outcome.plan.keep <= 1.0


def test_multiplying_back_gives_the_compressed_logits(case):
    dense = make_dense(AutoModelForCausalLM.from_pretrained(case.folder))
    assert not any(isinstance(m, LowRankLinear | PivotLinear) for m in dense.modules())
    assert {n: type(m) for n, m in dense.named_modules()} == {n: type(m) for n, m in case.dense.named_modules()} or (
        dense.config.model_type == "falcon"  # FalconLinear comes back as nn.Linear, which computes the same
    )
    torch.testing.assert_close(logits_of(dense, case.ids), case.small_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.fault(71)
def test_the_dense_export_is_an_ordinary_folder(case, tmp_path):
    facts = export_dense(resolve(str(case.folder)), tmp_path / "dense")
    assert facts["numbers"] == sum(p.numel() for p in case.dense.parameters())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(exported.config, "quantization_config")
    assert exported.state_dict().keys() == case.dense.state_dict().keys()
    torch.testing.assert_close(logits_of(exported, case.ids), case.small_logits, atol=1e-4, rtol=1e-4)
