"""`--low-memory`: the numbers of the block-by-block way, bit for bit, with one block of weights at a time."""

import gc
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from spectrim import low_memory_job
from spectrim.engines import measure, measure_blocks, newton, newton_blocks, propagate, recompute, way
from spectrim.engines.large import LargeRun
from spectrim.engines.layerwise import apply_plan
from spectrim.engines.learned import skeleton
from spectrim.engines.low_memory import LowMemoryRun
from spectrim.engines.low_memory_way import low_memory_method, low_memory_of
from spectrim.engines.norms import fused_norms
from spectrim.engines.outcome import Outcome
from spectrim.engines.plan_costs import Sizes
from spectrim.engines.relay import Relay
from spectrim.engines.spill import States
from spectrim.errors import InputError, NumericalError, ResourceError, UsageError
from spectrim.evaluate.language import evaluate
from spectrim.evaluate.streamed import evaluate_streamed
from spectrim.integrations.folder import finalise, round_to, write_folder
from spectrim.integrations.streamed_folder import hollow_result, write_streamed
from spectrim.job import Request, run
from spectrim.linalg.fallback import listening
from spectrim.models.load import meta_model, resolve
from spectrim.models.streamed import Home, Streamed, check_finite, open_streamed
from spectrim.models.walk import find_layers
from spectrim.registry import make_method
from spectrim.store import disk
from spectrim.store.scratch import Scratch
from spectrim.store.work import locked
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(6, 10)
CPU = torch.device("cpu")
FAST = {"steps": 0, "coupling": "none", "newton": 1}


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every CPU."""
    for module in (measure, measure_blocks, propagate, newton, newton_blocks):
        monkeypatch.setattr(module, "autocast", lambda _device: nullcontext())


def saved(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny model in files of its own."""
    tiny(architecture, **changes).save_pretrained(folder, max_shard_size="40KB")
    return folder


def opened(folder: Path) -> Streamed:
    return open_streamed(resolve(str(folder)), CPU, torch.float32)


def low_run(dense: Streamed, method: Any, scratch: Path, keep: float = 0.6) -> LowMemoryRun:
    scratch.mkdir()
    return LowMemoryRun(
        dense.model, method, dense.walk, keep, 2, None, {}, 4, length=10, streamed=dense, scratch=Scratch(scratch, CPU)
    )


# ---------- models whose blocks are read when they run


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3", "phi3", "falcon"])
def test_a_streamed_model_computes_what_the_model_does_and_holds_one_block(architecture: str, tmp_path: Path) -> None:
    dense = opened(saved(tmp_path / "m", architecture))
    assert torch.equal(logits_of(dense.model, IDS), logits_of(tiny(architecture), IDS))
    blocks = [dense.model.get_submodule(name) for name in dense.walk.block_names]
    assert [any(not p.is_meta for p in block.parameters()) for block in blocks] == [False, True]
    copy = skeleton(dense.model)
    assert torch.equal(logits_of(copy, IDS), logits_of(tiny(architecture), IDS))
    dense.home.let_go()
    assert all(p.is_meta for block in blocks for p in block.parameters())
    assert dense.home.bytes_held == 0


def test_a_copys_block_that_was_changed_and_let_go_does_not_run_again(tmp_path: Path) -> None:
    dense = opened(saved(tmp_path / "m", "llama"))
    copy = skeleton(dense.model)
    copy.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(32, 48, bias=False))
    logits_of(copy, IDS)
    with pytest.raises(AssertionError, match=r"model.layers.0 was changed"):
        logits_of(copy, IDS)
    assert torch.equal(logits_of(dense.model, IDS), logits_of(tiny("llama"), IDS))


@pytest.mark.parametrize("architecture", ["mixtral", "gpt-neox"])  # experts one by one; a head of another name
def test_names_that_the_model_does_not_have_are_refused(architecture: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", architecture)
    with pytest.raises((UsageError, InputError), match=r"[Ll]eave --low-memory out"):
        opened(tmp_path / "m")


def test_nan_in_the_files_is_found_tensor_by_tensor(tmp_path: Path) -> None:
    model = tiny("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("nan")  # type: ignore[union-attr,index]
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(NumericalError, match=r"layers.1.mlp.up_proj.weight: 1 of 1,536 values are NaN"):
        check_finite(resolve(str(tmp_path / "m")), CPU)


# ---------- the closed form


@pytest.mark.parametrize(
    ("architecture", "method", "options", "narrow"),
    [
        ("llama", "soco", FAST, False),
        ("llama-gqa-bias", "soco", {**FAST, "newton": 2}, True),
        ("phi3", "two-sided", {"coupling": "none", "storage": "factor"}, False),
        ("opt", "two-sided", {"coupling": "none", "propagate": 0.0}, False),
        ("gpt2", "afm", {}, False),
        ("qwen2", "svd-llm", {"storage": "pivot"}, False),
        ("gemma", "asvd", {}, False),
    ],
    ids=str,
)
def test_the_written_folder_is_that_of_the_way_block_by_block(
    architecture: str, method: str, options: dict[str, Any], narrow: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    for module in ("folder", "streamed_folder"):  # so that there are several files
        monkeypatch.setattr(f"spectrim.integrations.{module}.MAX_SHARD_SIZE", "15KB")
    if narrow:  # components in 16 bits around formed weights
        monkeypatch.setattr(recompute, "fits_whole", lambda *_: False)
    configured = make_method(method, options=options)
    source = resolve(str(saved(tmp_path / "m", architecture)))
    model = tiny(architecture)
    wanted = LargeRun(model, configured, find_layers(model), 0.6, 2, None, {}, 4, length=10)
    spectra, plan = wanted.closed_form(IDS)
    student = skeleton(model)
    placed = apply_plan(student, wanted.walk, plan, spectra, learned=wanted.changes, means=wanted.means)
    outcome = Outcome(model=student, method=configured, walk=wanted.walk, plan=plan, placed=placed)
    round_to(student, torch.bfloat16)
    write_folder(tmp_path / "wanted", finalise(outcome, torch.bfloat16, base_model=source.name), None)

    dense = open_streamed(source, CPU, torch.float32)
    found = low_run(dense, configured, tmp_path / "scratch")
    streams, again = found.closed_form(IDS)
    assert again == plan
    assert found.warnings == wanted.warnings
    hollow = Outcome(
        model=hollow_result(found, source, plan, torch.bfloat16),
        method=configured,
        walk=found.walk,
        plan=plan,
        placed={},
    )
    (tmp_path / "found").mkdir()
    put, logits = write_streamed(tmp_path / "found", found, streams, hollow, torch.bfloat16, source, {})
    assert {n: r.numbers for n, r in put.items()} == {n: r.numbers for n, r in placed.items()}
    files = sorted(path.name for path in (tmp_path / "wanted").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "found").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 1
    for name in files:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes(), name
    back = open_streamed(resolve(str(tmp_path / "found")), CPU, torch.bfloat16)
    few = torch.arange(16)[None] * 7919 % 64
    assert torch.equal(logits_of(back.model, few).float(), logits)
    judge_alike(student, model, found, opened(tmp_path / "found"))


def judge_alike(student: nn.Module, model: PreTrainedModel, found: LowMemoryRun, small: Streamed) -> None:
    """The figures of both models, block by block and as ever."""
    assert isinstance(student, PreTrainedModel)
    relay = Relay(small.model, small.walk, found.relay.gives_tuple)
    dense, both = evaluate_streamed(found.relay, relay, IDS)
    assert dense == evaluate(model, IDS)
    assert both == evaluate(student, IDS, dense=model)


class Counted:
    """How many numbers of the blocks' own weights are alive, at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self.known: list[weakref.ref[Tensor]] = []
        own = Home._tensor

        def tensor(home: Home, name: str, is_parameter: bool) -> Tensor:
            found = own(home, name, is_parameter)
            if not any(found is other for other in self.alive()):
                self.known.append(weakref.ref(found))
            self.most = max(self.most, sum(t.numel() for t in self.alive()))
            return found

        monkeypatch.setattr(Home, "_tensor", tensor)

    def alive(self) -> list[Tensor]:
        return [tensor for known in self.known if (tensor := known()) is not None]


@pytest.mark.parametrize("options", [FAST, {**FAST, "propagate": 0.0, "newton": 0}], ids=str)
def test_never_more_than_two_blocks_of_weights(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = opened(saved(tmp_path / "m", "llama", num_hidden_layers=5))
    counted = Counted(monkeypatch)
    in_a_block = sum(p.numel() for p in dense.at_hand(0).parameters())
    assert counted.most == in_a_block
    low_run(dense, make_method("soco", options=options), tmp_path / "scratch").closed_form(IDS)
    assert counted.most <= 2 * in_a_block
    dense.home.let_go()
    gc.collect()
    assert not counted.alive()


def test_propagation_that_runs_out_of_memory_goes_on_with_the_blocks_that_are_through(tmp_path: Path) -> None:
    saved(tmp_path / "m", "llama", num_hidden_layers=4)
    method = make_method("two-sided", options={"coupling": "none"})
    wanted, plan = low_run(opened(tmp_path / "m"), method, tmp_path / "one").closed_form(IDS)
    disturbed = low_run(opened(tmp_path / "m"), method, tmp_path / "two")
    told: list[int] = []

    def progress(stage: str, done: int, _total: int) -> None:
        if stage == "propagate":
            told.append(done)
            if told == [1, 2]:
                raise MemoryError

    disturbed.progress = progress
    with listening() as fallbacks:
        found, again = disturbed.closed_form(IDS)
    assert told == [1, 2, 1, 2, 3, 4]
    assert [fallback.operation for fallback in fallbacks] == ["propagate"]
    assert again == plan
    for name, spectrum in wanted.items():
        assert torch.allclose(found[name].energy, spectrum.energy, rtol=1e-4)


def test_states_go_to_files_when_the_device_has_no_room_and_files_go_with_them(tmp_path: Path) -> None:
    tensors = [torch.randn(2, 3).bfloat16() for _ in range(4)]
    room = [True, False, False, True, True, True]
    states = States(Scratch(tmp_path, CPU), lambda _: room.pop(0), tensors)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(torch.equal(a, b) for a, b in zip(states, tensors, strict=True))
    states[1] = tensors[0]
    assert torch.equal(states[1], tensors[0])
    assert torch.equal(States(states.scratch, lambda _: False, states[:2])[1], tensors[0])
    assert states.scratch.nbytes == 2 * 12
    del states
    assert not list(tmp_path.iterdir())


def test_a_signal_that_comes_while_a_file_is_removed_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = Scratch(tmp_path, CPU)
    kept, gone = scratch.put(torch.ones(3)), scratch.put(torch.ones(3))

    def told(_: Path) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(disk, "remove", told)
        del gone  # Python raises nothing that leaves a `__del__`
    with pytest.raises(KeyboardInterrupt):
        kept.read()
    assert torch.equal(kept.read(), torch.ones(3))


def test_no_block_is_there_when_norms_are_looked_for(tmp_path: Path) -> None:
    """Else those of one block would run as one kernel, and those of all others in single steps."""
    run = low_run(opened(saved(tmp_path / "m", "llama")), make_method("svd-llm"), tmp_path / "scratch")
    with fused_norms(run.dense, on="cpu") as names:
        assert names == ["model.norm"]


# ---------- the job


REQUEST: dict[str, Any] = {
    "keep": 0.6, "calib_windows": 4, "calib_length": 16, "eval_windows": 4, "device": "cpu", "low_memory": True
}  # fmt: skip


@pytest.mark.fresh_process
def test_a_folder_that_plain_transformers_loads(tmp_path: Path) -> None:
    made = run(Request(model="builtin:tiny", method="svd", **REQUEST), tmp_path / "low")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "low", local_files_only=True).eval()
    assert torch.equal(logits_of(made.model, IDS), logits_of(plain, IDS))
    assert made.report["reload"]["relative_logit_difference"] == 0
    assert made.report["low_memory"]["scratch_most_bytes"] > 0
    assert made.report["stored"]["keep"] == pytest.approx(0.6, abs=1e-3)
    assert made.report["quality"]["compressed"]["kl"] > 0
    assert any("no samples" in warning for warning in made.report["warnings"])
    assert [path.name for path in tmp_path.iterdir()] == ["low"]


@pytest.mark.slow
def test_the_command_gives_the_folder_that_it_gives_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(Request(model="builtin:tiny", method="svd", **REQUEST), tmp_path / "low")
    monkeypatch.setattr(way, "fits_whole", lambda *_: False)
    wanted = run(Request(model="builtin:tiny", method="svd", **{**REQUEST, "low_memory": False}), tmp_path / "usual")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "low" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes(), name
    assert made.report["quality"] == wanted.report["quality"]
    for part in ("layers", "stored", "forms", "text", "untouched"):
        assert made.report[part] == wanted.report[part]
    assert made.report["reload"]["relative_logit_difference"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low", "usual"]
    assert torch.equal(logits_of(made.model, IDS), logits_of(wanted.model, IDS))


def stopped_in(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The run ends while a block is written."""

    def write(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(low_memory_job, "write_streamed", write)


def test_a_run_that_is_stopped_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "m"
    shutil.copytree(BUILTIN, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    stopped_in(monkeypatch, KeyboardInterrupt())
    asked = {**REQUEST, "calib": "builtin:stdlib", "eval": "none"}
    with pytest.raises(KeyboardInterrupt):
        run(Request(model=str(source), method="svd", **asked), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_what_a_kill_leaves_is_swept_by_the_next_run(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as folder:
        scratch = Scratch(folder.path, CPU)
        kept = [scratch.put(torch.ones(3)) for _ in range(2)]  # held, as by a process that is still there
        assert len(list(folder.path.glob("scratch-*"))) == 2
        assert folder.states() == []
    with locked(tmp_path / "out") as folder:
        assert not list(folder.path.glob("scratch-*"))
    assert len(kept) == 2


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(tmp_path, CPU)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.pieces, "write", full)
    with pytest.raises(ResourceError, match=r"No space left on device .*free some space") as told:
        scratch.put(torch.ones(3))
    assert told.value.exit_code == 4


def test_too_little_room_is_told_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory_job, "disk_room", lambda *_: 10**18)
    monkeypatch.setattr(low_memory_job, "check_finite", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ResourceError, match=r"needs 1000000000.00 GB"):
        run(Request(model="builtin:tiny", method="svd", **REQUEST), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------- what is refused, and what is planned


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("soco", {}, "trains with the whole model in memory; use --preset fast"),
        ("soco", {"preset": "fast", "options": {"coupling": "sequence"}}, "use --set coupling=none"),
        ("two-sided", {"options": {"rounds": 2}}, "use --set rounds=1"),
        ("two-sided", {"options": {"allocation": "sensitivity"}}, "--set allocation=global"),
        ("tfwsvd", {}, "use one of svd, asvd"),
        ("modegpt", {}, "treats the model as a whole"),
        ("gptq", {}, "treats the model as a whole"),
        ("svd", {"recover": ("refit",)}, "leave --recover out"),
        ("svd", {"factor_bits": 8}, "--factor-bits works on the whole result"),
        ("svd", {"calib": "self"}, "sampling text needs the whole model"),
        ("svd", {"allow_nonfinite": "skip"}, "use refuse"),
        ("soco", {"preset": "fast", "shard_weights": True}, "--shard-weights shares weights out among processes"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(method: str, given: dict[str, Any], says: str) -> None:
    request = Request(model="builtin:tiny", method=method, keep=0.5, low_memory=True, **given)
    with pytest.raises(UsageError, match=says):
        low_memory_method(request, request.check())


def test_a_coupling_that_nobody_asked_for_gives_way() -> None:
    request = Request(model="builtin:tiny", method="two-sided", keep=0.5, low_memory=True)
    method, told = low_memory_method(request, request.check())
    assert method.refinement is None
    assert "coupling=none" in told[0]


def test_the_plan_of_a_7b_model_fits_a_card_of_24_gb() -> None:
    model = meta_model(
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    )
    walk, total = find_layers(model), sum(p.numel() for p in model.parameters())
    sizes = Sizes(
        walk=walk, hidden=4096, vocabulary=32000, keep=0.8, windows=256, gradient_windows=64, length=2048,
        eval_windows=40, bytes_read=2 * total, bytes_written=2 * total,
    )  # fmt: skip
    found = low_memory_of(make_method("soco", preset="fast"), sizes, total, number=2, limit=23 * 10**9)
    assert 10e9 < found.gpu <= 23e9
    assert found.host < 8e9
    packed, student, result = 36e9, 13e9, 13.5e9
    assert packed + student < found.scratch < packed + student + 7e9  # states that have no room on the GPU
    assert found.scratch <= found.disk < found.scratch + result


@pytest.mark.parametrize(
    ("method", "options"), [("soco", FAST), ("two-sided", {"coupling": "none", "storage": "factor"}), ("svd-llm", {})]
)
def test_scratch_files_take_what_is_planned(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = resolve(str(saved(tmp_path / "m", "llama", num_hidden_layers=6)))
    dense, configured = open_streamed(source, CPU, torch.float32), make_method(method, options=options)
    made = low_run(dense, configured, tmp_path / "scratch")
    made.closed_form(IDS)
    sizes = Sizes(
        walk=dense.walk, hidden=32, vocabulary=64, keep=0.6, windows=6, gradient_windows=4, length=10,
        eval_windows=0, bytes_read=0, bytes_written=0,
    )  # fmt: skip
    planned = low_memory_of(configured, sizes, 1, number=4, limit=None).scratch
    assert made.scratch.most_bytes <= planned <= 2 * made.scratch.most_bytes


def test_in_memory_it_is_refused() -> None:
    import spectrim

    with pytest.raises(UsageError, match="writes a folder as it goes"):
        spectrim.compress("builtin:tiny", keep=0.5, method="svd", low_memory=True)


BUILTIN = Path(__file__).resolve().parents[2] / "src" / "spectrim" / "assets" / "tiny"
