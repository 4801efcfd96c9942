"""A compressed folder in the hands of transformers: every way of loading, running and training it, in one file.

`make matrix` runs this file, and the golden folders, under the oldest and newest releases of transformers that
pyproject.toml admits, each in an environment of its own; the default run has it under the installed release.
"""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

import spectrim
from spectrim.nn.linears import LowRankLinear, PivotLinear

PROMPT = "The history of the city"
LAST = "model.layers.{}.mlp.down_proj"
ALLOWED = 1e-5
"""Of a logit, where sums are ordered differently."""


@pytest.fixture(scope="module", params=["pivot", pytest.param("factor", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at half its numbers."""
    small = spectrim.compress(
        "builtin:tiny", keep=0.5, method="svd", options={"storage": request.param}, eval="none",
        calib_windows=2, calib_length=32,
    )  # fmt: skip
    return small.save_pretrained(tmp_path_factory.mktemp("matrix") / request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    """As plain `from_pretrained` gives it, in float32; tests leave it as it is."""
    return load(folder)


@pytest.fixture(scope="module")
def ids(folder: Path) -> Tensor:
    return AutoTokenizer.from_pretrained(Path(spectrim.__file__).parent / "assets" / "tiny")(
        PROMPT, return_tensors="pt"
    )["input_ids"]


def load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def greedy(model: PreTrainedModel, ids: Tensor, **options) -> list[int]:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(ids, **options)[0].tolist()


def test_the_release_under_test_is_known(record_property):
    """What `make matrix` prints beside its verdict."""
    record_property("transformers", transformers.__version__)
    assert transformers.__version__.split(".")[0] in ("4", "5")


def test_every_listed_layer_is_a_low_rank_one_and_the_rest_is_not(model):
    kinds = {name for name, m in model.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    assert kinds == set(model.config.quantization_config.modules)
    assert len(kinds) > 10


def test_generation_is_the_step_by_step_argmax(model, ids):
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, logits(model, expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert greedy(model, ids) == expected[0].tolist()


def test_a_second_save_in_shards_gives_the_same_logits(model, folder, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps(model, folder, ids, device_map):
    assert torch.equal(logits(load(folder, device_map=device_map), ids), logits(model, ids))


def test_offload_to_disk(model, folder, ids, tmp_path):
    """The second half of the blocks stays on disk and is read when it is run."""
    blocks = model.config.num_hidden_layers
    where = {f"model.layers.{i}": "cpu" if i < blocks // 2 else "disk" for i in range(blocks)}
    where |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = load(folder, device_map=where, offload_folder=tmp_path)
    last = loaded.get_submodule(LAST.format(blocks - 1))
    assert all(parameter.is_meta for parameter in last.parameters())
    assert not any(p.is_meta for p in loaded.get_submodule(LAST.format(0)).parameters())
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=ALLOWED, rtol=ALLOWED)
    assert greedy(loaded, ids) == greedy(model, ids)


def test_bfloat16_and_half(folder, ids, model):
    for dtype in (torch.bfloat16, torch.float16):
        narrow = load(folder, dtype=dtype)
        assert {p.dtype for p in narrow.parameters()} == {dtype}
        found, expected = logits(narrow, ids).float(), logits(model, ids)
        assert float((found - expected).norm() / expected.norm()) < 0.02
        narrow.float()  # transformers refuses this of a quantised model: ours holds ordinary numbers
        assert {p.dtype for p in narrow.parameters()} == {torch.float32}


@pytest.mark.slow
def test_torch_compile_of_the_whole_model(model, folder, ids):
    """Without a graph break; `aot_eager` traces all that inductor would, and needs no compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(load(folder), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), atol=ALLOWED, rtol=ALLOWED)


def test_the_static_cache(model, ids):
    assert greedy(model, ids, cache_implementation="static", disable_compile=True) == greedy(model, ids)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(folder, ids):
    gradients = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_trains_all_factors_and_its_checkpoint_loads(folder, ids, tmp_path):
    trained, before = load(folder).train(), load(folder)
    options = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "gradient_checkpointing": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * 6
    trainer = Trainer(model=trained, args=TrainingArguments(output_dir=str(tmp_path), **options), train_dataset=rows)
    trainer.train()
    with torch.no_grad():
        first = before(input_ids=ids, labels=ids, use_cache=False).loss
        last = trained.eval()(input_ids=ids, labels=ids, use_cache=False).loss
    assert last < first
    still = [n for (n, a), b in zip(before.named_parameters(), trained.parameters(), strict=True) if torch.equal(a, b)]
    assert still == []
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(load(tmp_path / "saved"), ids), logits(trained, ids))


def test_back_to_dense(model, folder, ids):
    dense = load(folder).dequantize()
    assert not any(isinstance(m, LowRankLinear | PivotLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
