"""`plan` says what `compress` then does, without a weight; `inspect` says what is in the files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from command_line import PLAIN, TINY, call, change_config, change_weights, small_model
from spectrim import any_size_job, job
from spectrim.engines import plan as plan_module
from spectrim.engines.measure_blocks import whole_bytes
from spectrim.engines.passes import Passes
from spectrim.engines.plan_memory import resident
from spectrim.machine import Rates, measure_rates
from spectrim.models.load import meta_model, resolve
from spectrim.models.walk import find_layers
from spectrim.stats import Stat

RATES = Rates(
    device="cpu", computing_dtype="float32", products=1e10, full_products=1e10, copied=1e10, softmax=1e9, eigen=1e-9
)
PASSES = Passes(
    tokens=512, block=1e-5, block_back=3e-5, block_trained=4e-5, head=1e-5, head_back=3e-5, sampled=1e-4, compared=1e-4,
    judged=5e-5, short=1e-3, short_head=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    """No child process, and nothing clocked in each plan."""
    with (
        mock.patch.object(job, "reload_difference", return_value=0.0),
        mock.patch.object(plan_module, "measure_rates", return_value=RATES),
        mock.patch.object(plan_module, "clock_passes", return_value=PASSES),
    ):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied and untied embeddings, with and without biases."""
    where = tmp_path_factory.mktemp("models")
    return {
        "tied": small_model(where / "tied", vocab_size=8192),
        "untied": small_model(where / "untied", vocab_size=8192, tie_word_embeddings=False),
        "biases": small_model(where / "biases", vocab_size=8192, attention_bias=True, mlp_bias=True),
    }


def compressed(model: Path | str, out: Path, *options: object) -> dict[str, Any]:
    answer = call("compress", model, "--out", out, *PLAIN, "--json", *options)
    assert answer.code == 0, answer.err
    return answer.json


def planned(model: Path | str, *options: object) -> dict[str, Any]:
    """The plan, made while loading of weights is forbidden."""
    loaded = AssertionError("plan loaded the weights")
    with (
        mock.patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=loaded),
        mock.patch("safetensors.torch.load_file", side_effect=loaded),
        mock.patch("safetensors.safe_open", side_effect=loaded),
    ):
        answer = call("plan", model, "--json", *options)
    assert answer.code == 0, answer.err
    return answer.json


# ---- plan


@pytest.mark.parametrize("name", ["tied", "untied", "biases"])
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "svd", "--keep", "0.8"),
        ("--method", "asvd", "--keep", "0.37"),
        ("--method", "svd", "--set", "storage=pivot", "--keep", "0.5", "--dtype", "bfloat16"),
        ("--method", "svd", "--keep", "1"),
    ],
    ids=" ".join,
)
def test_a_uniform_plan_is_what_compress_does(
    models: dict[str, Path], tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    plan, report = planned(models[name], *options), compressed(models[name], tmp_path / "out", *options)
    assert plan["ranks_known"]
    keys = ("name", "shape", "codec", "rank", "numbers")
    assert [{k: row[k] for k in keys} for row in plan["layers"]] == [
        {k: row[k] for k in keys} for row in report["layers"]
    ]
    stored, source = report["stored"], report["source"]
    assert plan["linear_numbers"] == {"before": stored["linear_numbers_dense"], "after": stored["linear_numbers"]}
    assert plan["model_numbers"] == {"before": source["numbers"], "after": stored["model_numbers"]}
    assert plan["model_bytes"] == {"before": source["bytes"], "after": stored["model_bytes"]}
    assert plan["disk_bytes"] >= sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan["untouched"] == report["untouched"]
    assert plan["method"] == report["method"]


def test_low_memory_makes_no_samples_and_none_are_planned(models: dict[str, Path]) -> None:
    options = ("--method", "svd", "--keep", "0.6")
    plain, low = planned(models["tied"], *options), planned(models["tied"], *options, "--low-memory")
    assert plain["seconds_by_stage"].keys() - low["seconds_by_stage"].keys() == {"samples"}


def test_a_global_plan_bounds_what_compress_does(models: dict[str, Path], tmp_path: Path) -> None:
    options = ("--method", "two-sided", "--keep", "0.6")
    plan, report = planned(models["biases"], *options), compressed(models["biases"], tmp_path / "out", *options)
    assert not plan["ranks_known"]
    assert {row["rank"] for row in plan["layers"]} == {None}
    assert plan["linear_numbers"]["after"] <= 0.6 * plan["linear_numbers"]["before"]
    for part in ("linear_numbers", "model_numbers"):
        over = plan[part]["after"] - report["stored"][part]
        assert 0 <= over <= 64, part
    assert 0 <= plan["model_bytes"]["after"] - report["stored"]["model_bytes"] <= 4 * 200  # masks: one byte, not four


def test_the_embedded_model_planned_and_shown() -> None:
    answer = call("plan", "builtin:tiny", "--method", "svd", "--keep", "0.5")
    assert answer.code == 0
    assert answer.err == ""
    assert "model.layers.7.mlp.down_proj" in answer.out
    shown = re.search(r"^linear_numbers +6,324,224 -> ([\d,]+)$", answer.out, flags=re.M)
    assert shown is not None
    assert 3_162_112 - 512 < int(shown[1].replace(",", "")) <= 3_162_112
    assert "untouched: model.embed_tokens.weight (2,097,152 numbers): input embedding" in answer.out


def test_the_plan_counts_more_work_for_methods_that_do_more(models: dict[str, Path]) -> None:
    plans = [planned(models["tied"], "--method", m, *o) for m, o in
             [("svd", ()), ("svd-llm", ()), ("two-sided", ()), ("soco", ("--preset", "balanced")),
              ("soco", ("--preset", "best"))]]  # fmt: skip
    seconds = [plan["seconds"] for plan in plans]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 5
    assert all(plan["seconds"] == pytest.approx(sum(plan["seconds_by_stage"].values())) for plan in plans)
    memory = [max(plan["memory_by_stage"].values()) for plan in plans]
    assert memory[:4] == sorted(memory[:4])
    assert memory[4] > 2 * memory[2]  # best trains factors, balanced scores: either takes far more than the closed form
    for plan in plans:
        assert plan["peak_memory_bytes"]["host"] > max(plan["memory_by_stage"].values()) + resident() // 2


def test_a_plan_knows_recovery_and_training_for_all_sizes(models: dict[str, Path]) -> None:
    plain = planned(models["tied"], "--method", "svd-llm")
    repaired = planned(models["tied"], "--method", "svd-llm", "--recover", "block:5", "--recover", "kl:20")
    more = planned(models["tied"], "--method", "svd-llm", "--recover", "block:5", "--recover", "kl:40")
    assert repaired["recovery"] == ["block:5", "kl:20"]
    assert set(repaired["seconds_by_stage"]) - set(plain["seconds_by_stage"]) == {"block", "distil"}
    assert plain["seconds"] < repaired["seconds"] < more["seconds"]
    assert repaired["memory_by_stage"]["recover"] > plain["memory_by_stage"]["recover"]
    trained = [planned(models["tied"], "--any-size", "--any-size-steps", steps)["seconds"] for steps in (100, 200)]
    assert trained[0] < trained[1]


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_a_plan_in_few_bits_is_what_compress_stores(models: dict[str, Path], tmp_path: Path, storage: str) -> None:
    bits = ("--factor-bits", "4", "--factor-group-size", "16", "--keep", "0.6")
    options = ("--method", "svd", "--set", f"storage={storage}", *bits)
    plan, report = planned(models["biases"], *options), compressed(models["biases"], tmp_path / "out", *options)
    stored = report["stored"]
    assert plan["linear_numbers"]["after"] == stored["linear_numbers"]
    assert plan["linear_bytes"]["after"] == stored["linear_bytes"]
    assert plan["model_numbers"]["after"] == stored["model_numbers"]
    assert plan["model_bytes"]["after"] == stored["model_bytes"]
    assert [row["codec"] for row in plan["layers"]] == [row["codec"] for row in report["layers"]]


def test_a_plan_for_all_sizes_is_what_the_folder_takes(models: dict[str, Path], tmp_path: Path) -> None:
    options = ("--method", "svd-llm", "--any-size", "--anchors", "0.8,0.5")
    with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
        report = compressed(models["biases"], tmp_path / "out", *options)
    plan = planned(models["biases"], *options)
    assert plan["any_size"]
    assert plan["model_numbers"]["after"] == pytest.approx(report["stored"]["model_numbers"], rel=0.02)
    assert plan["model_bytes"]["after"] == pytest.approx(report["stored"]["model_bytes"], rel=0.02)


def test_a_plan_in_bytes_keeps_to_them(models: dict[str, Path]) -> None:
    options = ("--keep-bytes", "0.98", "--dtype", "bfloat16")
    plan = planned(models["untied"], *options)
    assert plan["method"]["method"] == "trellis"
    assert plan["model_bytes"]["after"] <= 0.98 * plan["model_bytes"]["before"] / 2 + 2  # of a source in float32
    assert plan["linear_numbers"]["after"] is None
    assert plan["seconds"] == pytest.approx(sum(plan["seconds_by_stage"].values()))
    assert plan["seconds_by_stage"].keys() >= {"calibrate", "predict", "compress"}
    assert "counted in bytes" in call("plan", models["untied"], *options).out


def test_the_time_of_a_method_that_has_not_said_what_it_does_is_not_told(models: dict[str, Path]) -> None:
    assert planned(models["tied"], "--method", "modegpt")["seconds"] is None
    assert "not known for method modegpt" in call("plan", models["tied"], "--method", "modegpt").out


def test_flags_of_several_processes(models: dict[str, Path]) -> None:
    learned = ("--set", "steps=40", "--set", "batch_size=8", "--eval", "none")
    alone, both = planned(models["tied"], *learned), planned(models["tied"], *learned, "--world", "2")
    parts = planned(models["tied"], *learned, "--world", "2", "--shard-weights")
    assert (both["world"], both["weights_in_parts"], parts["weights_in_parts"]) == (2, False, True)
    assert "world" not in alone
    held = [plan["memory_by_stage"]["learn"] for plan in (alone, both, parts)]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 3
    for stage in ("calibrate", "decompose", "learn"):
        assert 0.45 < both["seconds_by_stage"][stage] / alone["seconds_by_stage"][stage] < 0.6
    assert any("each of 2 processes" in note for note in both["notes"])
    assert planned(models["tied"], *learned, "--deterministic")["seconds"] > 0


def test_a_task_of_an_array_and_its_merge(models: dict[str, Path]) -> None:
    words = ("--method", "svd-llm", "--calib-windows", "64")
    whole, task = planned(models["tied"], *words), planned(models["tied"], *words, "--shard", "2/4")
    merge = planned(models["tied"], *words, "--shard", "merge/4")
    assert set(task["seconds_by_stage"]) == {"start", "text", "load", "calibrate"}
    assert task["seconds_by_stage"]["calibrate"] == pytest.approx(whole["seconds_by_stage"]["calibrate"] / 4)
    assert merge["seconds_by_stage"].get("calibrate", 0) == 0
    walk = find_layers(meta_model(resolve(str(models["tied"])).config))
    assert task["disk_bytes"] == whole_bytes(walk, frozenset({Stat.GRAM}))
    assert merge["scratch_bytes"] == 4 * task["disk_bytes"]
    assert (task["shard"], merge["shard"]) == ("2/4", "merge/4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shard-weights",), "there is one"),
        (("--method", "gptq", "--set", "group_size=8", "--keep", "0.9", "--world", "2"), "treats the model as a whole"),
        (("--any-size", "--world", "2"), "--any-size is not spread"),
        (("--method", "svd", "--shard", "1/2"), "no first pass"),
        (("--shard", "3/2"), "1/N to N/N"),
        (("--recover", "kl:2", "--world", "2"), "recovery step kl"),
    ],
)
def test_a_plan_refuses_what_the_run_would(models: dict[str, Path], words: tuple[str, ...], said: str) -> None:
    answer = call("plan", models["tied"], *words)
    assert answer.code == 2
    assert said in " ".join(answer.err.split())


def test_rates_are_measured() -> None:
    rates = measure_rates(torch.device("cpu"))
    assert min(rates.products, rates.full_products, rates.copied, rates.softmax) > 1e6
    assert 0 < rates.eigen < 1e-5


@pytest.mark.fault(72)
def test_a_plan_for_a_compressed_folder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    compressed(models["tied"], tmp_path / "out", "--method", "svd")
    answer = call("plan", tmp_path / "out", "--method", "svd")
    assert answer.code == 2
    assert "already compressed by spectrim" in answer.message
    assert "export --to dense" in answer.message


@pytest.mark.fault(15)
def test_plan_refuses_a_config_of_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["tied"], tmp_path / "model")
    change_config(tmp_path / "model", num_hidden_layers=5)
    answer = call("plan", tmp_path / "model", "--method", "svd")
    assert answer.code == 3
    assert "config.json asks for 5 blocks" in answer.message


# ---- inspect


def dense_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The product of a layer's stored parts, written out here once more."""
    if f"{name}.U.weight" in tensors:
        return tensors[f"{name}.U.weight"].double() @ tensors[f"{name}.V.weight"].double()
    if f"{name}.pivot.weight" in tensors:
        rows, rest = tensors[f"{name}.pivot.weight"].double(), tensors[f"{name}.rest.weight"].double()
        weight = torch.empty(len(rows) + len(rest), rows.shape[1], dtype=torch.float64)
        bits = [int(byte) >> bit & 1 for byte in tensors[f"{name}.mask"] for bit in range(8)]
        mask = torch.tensor(bits[: len(weight)], dtype=torch.bool)
        weight[mask], weight[~mask] = rows, rest @ rows
        return weight
    return tensors[f"{name}.weight"].double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tied", ("--method", "svd", "--keep", "0.7")),
        ("untied", ("--method", "two-sided", "--keep", "0.5", "--dtype", "bfloat16")),
        ("biases", ("--method", "two-sided", "--keep", "0.9")),
    ],
)
def test_inspect_counts_and_decomposes_what_is_stored(
    models: dict[str, Path], tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    report = compressed(models[name], tmp_path / "out", *options)
    facts = call("inspect", tmp_path / "out", "--json").json
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = report["stored"]
    assert facts["numbers"] == stored["model_numbers"] == sum(t.numel() for t in tensors.values())
    assert facts["bytes"] == stored["model_bytes"] == sum(t.nbytes for t in tensors.values())
    assert facts["linear_numbers"] == stored["linear_numbers"]
    assert facts["linear_numbers_dense"] == stored["linear_numbers_dense"]
    assert (facts["format"], facts["format_version"], facts["method"]) == ("spectrim", 1, options[1])
    assert facts["base_model"] == str(models[name])
    keys = ("name", "shape", "codec", "rank", "numbers")
    assert [{k: r[k] for k in keys} for r in facts["layers"]] == [{k: r[k] for k in keys} for r in report["layers"]]
    for row in facts["layers"]:
        weight = dense_weight(tensors, row["name"])
        assert list(weight.shape) == row["shape"]
        assert row["numbers"] == sum(t.numel() for n, t in tensors.items() if n.startswith(row["name"] + "."))
        values = torch.linalg.svdvals(weight)
        kept, spectrum = values[: row["rank"]], row["spectrum"]
        assert float(values[row["rank"] :].sum()) <= 1e-5 * float(kept[0])
        assert spectrum["largest"] == pytest.approx(float(kept[0]), rel=1e-5)
        assert spectrum["median"] == pytest.approx(float(kept[len(kept) // 2]), rel=1e-5)
        assert spectrum["smallest"] == pytest.approx(float(kept[-1]), rel=1e-4, abs=1e-6 * float(kept[0]))
        assert spectrum["stable_rank"] == pytest.approx(float(kept.square().sum() / kept[0].square()), rel=1e-5)


def test_inspect_lists_blocks_that_stayed_dense(tmp_path: Path) -> None:
    """A budget for all layers may leave a whole block alone; it still counts."""
    model, out = small_model(tmp_path / "model"), tmp_path / "out"
    change_weights(model, "model.layers.1.", lambda tensor: tensor.mul_(100))
    compressed(model, out, "--method", "svd", "--set", "allocation=global", "--keep", "0.98")
    config = json.loads((out / "config.json").read_text())
    assert {name.split(".")[2] for name in config["quantization_config"]["modules"]} == {"0"}
    facts = call("inspect", out, "--json", "--no-spectrum").json
    assert len(facts["layers"]) == 14
    assert 0.97 < facts["linear_numbers"] / facts["linear_numbers_dense"] <= 0.98
    assert "spectrum" not in facts["layers"][0]


def test_inspect_of_the_dense_embedded_model() -> None:
    facts = call("inspect", "builtin:tiny", "--json", "--no-spectrum").json
    assert facts["format"] == "dense"
    assert facts["method"] is None
    assert facts["dtype"] == "bfloat16"
    counted = [t for shard in TINY.glob("*.safetensors") for t in load_file(shard).values()]
    assert facts["numbers"] == sum(t.numel() for t in counted)
    assert facts["bytes"] == sum(t.nbytes for t in counted)
    assert facts["linear_numbers"] == facts["linear_numbers_dense"] == 6_324_224
    assert len(facts["layers"]) == 56


def test_inspect_shows_the_figures_to_people(models: dict[str, Path]) -> None:
    answer = call("inspect", models["tied"])
    facts = call("inspect", models["tied"], "--json").json
    row = next(r for r in facts["layers"] if r["name"] == "model.layers.1.mlp.down_proj")
    line = next(line for line in answer.out.splitlines() if row["name"] in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    values = [f"{row['spectrum'][key]:.4g}" for key in ("largest", "smallest", "stable_rank")]
    assert cells == [row["name"], "32x48", "dense", "32", "1,536", *values]
    assert "decoder linears 15,360 numbers (keep 1.0000); whole model 277,664 numbers, 1,110,656 bytes" in answer.out
