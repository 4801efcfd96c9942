"""One run, from request to published folder: what is refused when, what is rounded, what a failure leaves."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from command_line import VOCABULARY, call, change_weights, hashes, small_model, small_text
from spectrim import any_size_job, job, memory, reloaded
from spectrim.cli_options import load_lines
from spectrim.data import evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.learned import skeleton
from spectrim.errors import InputError, NumericalError, SpectrimError, UsageError
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.job import Request, run
from spectrim.options import recovery_of
from spectrim.registry import make_method
from spectrim.resume import ResumeOptions
from spectrim.store import verify_manifest


def request(model: Path | str, **fields: Any) -> Request:
    quick = {"keep": 0.8, "method": "svd", "calib_windows": 4, "calib_length": 32, "eval": "none"}
    return Request(model=str(model), **{**quick, **fields})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


@pytest.fixture
def quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


# ---- the request


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep": 0}, "keep must be in (0, 1], got 0"),
        ({"keep": 20}, "did you mean 0.2?"),
        ({"calib_windows": 0}, "calib_windows must be at least 1, got 0"),
        ({"calib_length": 1}, "calib_length must be at least 2, got 1"),
        ({"gradient_windows": 0}, "gradient_windows must be at least 1, got 0"),
        ({"train_windows": -1}, "train_windows must be at least 1, got -1"),
        ({"eval_windows": 0}, "eval_windows must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in [0, 2**63), got -1"),
        ({"seed": 2**63}, "seed must be in [0, 2**63)"),
        ({"recover": ("refti",)}, "unknown recovery step 'refti'; did you mean 'refit'?"),
        ({"recover": ("klm:3",)}, "unknown recovery step 'klm'; did you mean 'kl'?"),
        ({"recover": ("kl", "block:x")}, "'block:x': the number of steps must be a whole number in [1, 1000000]"),
        ({"recover": ("kl:0",)}, "got '0'; e.g. kl:300"),
        ({"recover": ("kl:-3",)}, "got '-3'"),
        ({"recover": ("kl:",)}, "got ''"),
        ({"recover": ("kl:1000001",)}, "got '1000001'"),
        ({"recover": ("refit:3",)}, "refit is solved directly and takes no number of steps; write refit"),
        ({"method": "svdllm"}, "unknown method 'svdllm'; did you mean 'svd-llm'?"),
        ({"method": "soco", "preset": "bset"}, "method soco: unknown preset 'bset'; did you mean 'best'?"),
        ({"method": "soco", "options": {"step": 3}}, "method soco: unknown option 'step'; did you mean 'steps'?"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        request("nowhere", **fields).check()
    assert says in str(caught.value)


def test_a_request_is_the_same_after_json() -> None:
    asked = request("builtin:tiny", recover=("refit", "block", "kl:20"), options={"rounds": 0}, gradient_windows=3)
    again = Request(**json.loads(json.dumps(dataclasses.asdict(asked))))
    assert dataclasses.replace(again, recover=tuple(again.recover), anchors=tuple(again.anchors)) == asked
    assert again.check() == asked.check()


# ---- order: cheap refusals first


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"calib": "missing.txt"}, InputError),
        ({"eval": "missing.txt"}, InputError),
        ({"tokenizer": "nowhere"}, InputError),
        ({"dtype": "float64"}, UsageError),
        ({"device": "tpu"}, UsageError),
        ({"keep": 0.001}, UsageError),
    ],
)
def test_refused_before_the_weights_are_loaded(
    model: Path, tmp_path: Path, fields: dict[str, Any], kind: type[SpectrimError]
) -> None:
    loaded = AssertionError("loaded the weights")
    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=loaded), pytest.raises(kind):
        run(request(model, **fields), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_refused_input_creates_no_parent_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run(request(tmp_path), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


# ---- after writing


def spoil(folder: Path, _ids: torch.Tensor, _device: torch.device) -> torch.Tensor:
    """What a faulty save would do: one factor is off when the folder is loaded again."""
    name = "model.layers.1.mlp.up_proj.U.weight"
    change_weights(folder, name, lambda tensor: tensor.mul_(1.05))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=_ids).logits.float()


@pytest.mark.parametrize(
    ("elsewhere", "says"),
    [
        (spoil, "nothing was published"),
        (lambda _f, ids, _d: torch.full((1, ids.shape[1], VOCABULARY), torch.nan), "not finite"),
        (lambda _f, ids, _d: torch.zeros(1, ids.shape[1], 10), "gives logits of shape (1, 16, 10)"),
    ],
)
@pytest.mark.parametrize("occupied", [False, True])
def test_a_reload_that_differs_publishes_nothing(
    model: Path, tmp_path: Path, elsewhere: Callable[..., torch.Tensor], says: str, occupied: bool
) -> None:
    out = tmp_path / "out"
    if occupied:
        small_model(out, seed=1)
    before = {folder: hashes(folder) for folder in (model, out) if folder.exists()}
    asked = request(model, options={}, keep=0.9)
    with mock.patch.object(reloaded, "logits_elsewhere", elsewhere), pytest.raises(NumericalError) as caught:
        run(asked, out, overwrite=True, options=ResumeOptions(save_every_s=1e9))  # no state, however slow it is
    assert says in str(caught.value)
    assert {folder: hashes(folder) for folder in (model, out) if folder.exists()} == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in before}


@pytest.mark.fault(45)
def test_logits_that_were_nan_before_saving_are_not_taken_for_equal(model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.layers.0.input_layernorm.weight", lambda tensor: tensor.fill_(3e38))
    finite = torch.zeros(1, 16, VOCABULARY)
    with (
        mock.patch.object(reloaded, "logits_elsewhere", return_value=finite),
        pytest.raises(NumericalError, match="nan"),
    ):
        run(request(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_numbers_than_asked_for_are_never_published(model: Path, tmp_path: Path) -> None:
    def spend(compressed: Any) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = compressed(*arguments, **options)
            result.report["request"]["keep"] = 0.5
            return result

        return wrapped

    with (
        mock.patch.object(job, "compress_source", spend(job.compress_source)),
        pytest.raises(NumericalError, match=r"more than keep 0\.5 of 15,360 allows"),
    ):
        run(request(model, keep=0.8), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- dtypes


def test_figures_are_about_the_rounded_weights(tmp_path: Path, quick_reload: None) -> None:
    model = small_model(tmp_path / "model", initializer_range=0.2)
    asked = request(
        model, dtype="bfloat16", keep=1.0, eval=str(small_text(tmp_path / "text.txt")), eval_windows=2, method="svd"
    )
    report = run(asked, tmp_path / "out").report
    assert report["stored"]["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    texts = load_texts(str(tmp_path / "text.txt"), split="evaluation")
    ids = evaluation_windows(texts, load_tokenizer(model), length=32, count=2).ids
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert report["quality"]["compressed"]["perplexity"] == pytest.approx(evaluate(stored, ids).perplexity, rel=1e-6)
    assert report["quality"]["compressed"]["kl"] > 0


def test_rounding_leaves_the_dense_model_alone_and_tied_weights_tied(model: Path) -> None:
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    student = skeleton(dense)
    round_to(student, torch.bfloat16)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name].bfloat16().float()), name
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.fault(45)
def test_a_value_that_the_stored_dtype_cannot_hold_is_refused(model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.norm.weight", lambda tensor: tensor.mul_(1e5))
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: its largest value, 1e\+05, .* float16"):
        run(request(model, dtype="float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        run(request(model, dtype="bfloat16"), tmp_path / "out")
    verify_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "told"), [("auto", False), ("bfloat16", False), ("float32", True), ("float16", True)]
)
def test_more_digits_than_the_model_was_held_in_are_told(
    tmp_path: Path, quick_reload: None, monkeypatch: pytest.MonkeyPatch, dtype: str, told: bool
) -> None:
    model = small_model(tmp_path / "model")
    nn.Module.to(AutoModelForCausalLM.from_pretrained(model), torch.bfloat16).save_pretrained(model)
    assert run(request(model, dtype="float32"), tmp_path / "wide").report["warnings"] == []
    monkeypatch.setattr(memory, "holds_wide", lambda *_: False)
    warnings = run(request(model, dtype=dtype), tmp_path / "out").report["warnings"]
    assert [f"--dtype {dtype}: the model was held in bfloat16" in text for text in warnings] == [True] * told


# ---- text


@pytest.mark.fault(69)
def test_calibrating_and_evaluating_on_one_text_is_told(model: Path, tmp_path: Path, quick_reload: None) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    report = run(request(model, calib=str(text), eval=str(text), eval_windows=2), tmp_path / "out").report
    assert report["warnings"] == ["calibrated and evaluated on the same text: the figures flatter the result"]
    assert report["warnings"][0] in (tmp_path / "out" / "README.md").read_text()


def test_an_evaluation_text_shorter_than_asked_is_told(model: Path, tmp_path: Path, quick_reload: None) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 10)
    report = run(request(model, eval=str(text), eval_windows=40), tmp_path / "out").report
    windows = report["text"]["evaluation"]["windows"]
    assert windows < 40
    assert report["warnings"] == [f"evaluation: asked for 40 windows of 32 tokens, the text holds {windows}"]


def test_windows_are_no_longer_than_the_context(tmp_path: Path, quick_reload: None) -> None:
    model = small_model(tmp_path / "model", max_position_embeddings=16)
    report = run(request(model, calib="self", calib_length=512), tmp_path / "out").report
    assert report["text"]["calibration"]["length"] == 16
    assert report["text"]["calibration"]["source"] == "self"


@pytest.mark.parametrize(("method", "plain"), [("slicegpt", True), ("modegpt", False)])
def test_the_card_says_whether_spectrim_is_needed(
    model: Path, tmp_path: Path, quick_reload: None, method: str, plain: bool
) -> None:
    report = run(request(model, method=method, keep=0.75), tmp_path / "out").report
    assert report["stored"]["format"] == ("plain" if plain else "spectrim")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("import spectrim" not in card) == plain
    assert ("narrower layers" if plain else "in the form `narrow`") in card
    assert load_lines(tmp_path, plain=plain).count("import spectrim\n") == (not plain)


def test_text_of_the_models_own_is_twice_as_long_unless_told(tmp_path: Path, quick_reload: None) -> None:
    model = small_model(tmp_path / "model")
    asked = request(model, calib="self", calib_length=4, calib_windows=None)
    assert run(asked, tmp_path / "out").report["text"]["calibration"]["windows"] == 512
    assert (request(model, calib_windows=None).statistics_windows, asked.statistics_windows) == (256, 512)
    assert request(model, calib="self", calib_windows=3).statistics_windows == 3


@pytest.mark.parametrize("any_size", [False, True])
def test_a_model_without_tokenizer_is_judged_on_its_own_samples(
    tmp_path: Path, quick_reload: None, any_size: bool
) -> None:
    model = small_model(tmp_path / "model", tokenizer=False)
    asked = request(model, keep=0.9, calib="self", eval="self", eval_windows=8, any_size=any_size, anchors=(0.9, 0.5))
    if any_size:
        with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
            report = any_size_job.run_any_size(asked, tmp_path / "out")
        figures, dense = report["sizes"][0]["quality"], report["dense"]
    else:
        report = run(asked, tmp_path / "out").report
        figures, dense = report["quality"]["compressed"], report["quality"]["dense"]
    text = report["text"]
    assert text["evaluation"]["source"] == text["calibration"]["source"] == "self"
    assert text["evaluation"]["sha256"] != text["calibration"]["sha256"]
    assert "not text that people wrote" in (tmp_path / "out" / "README.md").read_text()
    assert dense["tokens"] == 8 * 31
    assert figures["kl"] > 0
    answer = call(
        "eval", tmp_path / "out", "--against", model, "--text", "self", "--windows", 8, "--length", 32, "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["sha256"] == text["evaluation"]["sha256"]
    assert answer.json["model"]["kl"] == pytest.approx(figures["kl"], rel=1e-3)


def test_eval_on_samples_needs_the_model_that_they_are_from(model: Path) -> None:
    answer = call("eval", model, "--text", "self")
    assert answer.code == 2
    assert "--text self samples the text from the dense model; name it with --against" in answer.message


def test_eval_without_a_tokenizer_says_what_needs_none(tmp_path: Path) -> None:
    answer = call("eval", small_model(tmp_path / "model", tokenizer=False))
    assert answer.code == 3
    assert answer.message.endswith("or --text self --against DENSE, which needs no tokenizer")


# ---- a learned method


def test_a_learned_method_reports_what_it_did(model: Path, tmp_path: Path, quick_reload: None) -> None:
    stages: list[str] = []
    report = run(
        request(model, method="soco", train_windows=8,
                options={"steps": 20, "batch_size": 2, "distil_steps": 2, "explore": 0.3, "refine": 0.3},
                eval=str(small_text(tmp_path / "text.txt")), eval_windows=2),
        tmp_path / "out",
        progress=lambda stage, _done, _total: stages.append(stage),
    ).report  # fmt: skip
    assert len(report["learning"]["losses"]) == 20
    assert len(report["learning"]["distil_losses"]) == 2
    keeps = report["learning"]["keeps"]
    assert keeps[0] > keeps[-1]
    assert report["text"]["training"]["windows"] == 8
    assert report["text"]["calibration"]["windows"] == 4
    assert report["method"]["steps"] == 20
    assert report["stored"]["keep"] <= 0.8
    assert {"load", "calibrate", "learn", "distil"} <= report["seconds"].keys()
    assert stages[0] == "load"
    assert stages[-2:] == ["write", "reload in a fresh process"]
    verify_manifest(tmp_path / "out")


# ---- recovery steps


@pytest.mark.parametrize(
    ("method", "options", "asked", "steps"),
    [
        ("svd", {}, (), []),
        ("svd", {}, ("kl", "block:7", "refit", "kl:2"), ["kl:300", "block:7", "refit", "kl:2"]),
        ("svd-llm", {"update": "sequential"}, ("block",), ["refit", "block:100"]),
        ("soco", {"distil_steps": 5}, ("refit",), ["refit", "kl:5"]),
    ],
)
def test_recovery_steps_in_their_order(
    method: str, options: dict[str, Any], asked: tuple[str, ...], steps: list[str]
) -> None:
    assert [str(step) for step in recovery_of(make_method(method, options=options), asked)] == steps


def test_any_method_can_be_followed_by_training(model: Path, tmp_path: Path, quick_reload: None) -> None:
    asked = request(model, recover=("block:2", "refit", "kl:3"), train_windows=6, keep=0.6)
    report = run(asked, tmp_path / "out").report
    done = {entry["step"]: [len(losses) for losses in entry["losses"]] for entry in report["learning"]["recovery"]}
    assert done == {"block:2": [2, 2], "refit": [], "kl:3": [3]}
    assert report["learning"]["distil_losses"] == report["learning"]["recovery"][2]["losses"][0]
    assert report["text"]["training"]["windows"] == 6
    assert report["text"]["calibration"]["windows"] == 4
    assert {"block", "refit", "distil"} <= report["seconds"].keys()
    assert report["stored"]["keep"] <= 0.6
    source, stored = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(source[norm], stored[norm])  # what block refinement trained is what is written
    assert torch.equal(source["model.norm.weight"], stored["model.norm.weight"])
    verify_manifest(tmp_path / "out")


def test_without_a_step_that_trains_only_calibration_windows_are_cut(
    model: Path, tmp_path: Path, quick_reload: None
) -> None:
    report = run(request(model, recover=("refit",)), tmp_path / "out").report
    assert report["text"]["training"] is None
    assert report["learning"]["recovery"] == [{"step": "refit", "losses": []}]
