"""Wrong options, damaged models, unusable text, full disks and signals, through the command line.

After every one: the exit code of its kind, a message that says what, where, what is allowed and what to do; no output
folder, no partial one, and the source byte for byte what it was.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from unittest import mock

import pytest
import torch

from command_line import (
    PLAIN,
    TINY,
    TOKENIZER_FILES,
    call,
    change_config,
    change_weights,
    hashes,
    small_model,
    small_text,
)
from spectrim import cli, job, reloaded, terminal
from spectrim.errors import Interrupted
from spectrim.registry import all_methods
from spectrim.report import documents
from spectrim.store import target

pytestmark = pytest.mark.faults

USAGE, INPUT, RESOURCE, NUMERICAL, INTERNAL = 2, 3, 4, 5, 6


@pytest.fixture(scope="module", autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


def refused(code: int, model: Path | str, *options: object, out: Path | None = None, where: Path) -> str:
    """The message of a `compress` that must fail with `code` and leave everything in `where` as it was."""
    before, names = hashes(where), sorted(where.iterdir())
    never = ("--save-every", "1e9")  # no state is kept, however slow the machine is
    answer = call("compress", model, "--out", out or where / "out", *PLAIN, *never, "--method", "svd", *options)
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "bug of spectrim" not in answer.err
    assert hashes(where) == before
    assert sorted(where.iterdir()) == names
    return answer.message


def accepted(model: Path | str, *options: object, where: Path) -> dict:
    answer = call("compress", model, "--out", where / "out", *PLAIN, "--method", "svd", "--json", *options)
    assert answer.code == 0, answer.err
    return answer.json


# ---- options


@pytest.mark.fault(54, 68)
@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("0", "keep must be in (0, 1], got 0"),
        ("-1", "keep must be in (0, 1], got -1"),
        ("1.5", "keep must be in (0, 1], got 1.5"),
        ("20", "keep must be in (0, 1], got 20: the share of stored numbers that remains; did you mean 0.2?"),
        ("nan", "keep must be in (0, 1], got nan"),
        ("inf", "keep must be in (0, 1], got inf"),
        ("half", "Invalid value for '--keep'"),
    ],
)
def test_keep(keep: str, says: str, model: Path, tmp_path: Path) -> None:
    assert says in refused(USAGE, model, "--keep", keep, where=tmp_path)
    answer = call("plan", model, "--keep", keep, "--method", "svd")
    assert answer.code == USAGE
    assert says in answer.message


@pytest.mark.fault(54)
@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_keep_too_small_names_the_smallest(method: str, model: Path, tmp_path: Path) -> None:
    message = refused(USAGE, model, "--method", method, "--keep", "0.01", where=tmp_path)
    assert "keep 0.01 leaves 153 numbers for 14 weights; rank 1 everywhere takes" in message
    assert re.search(r"The smallest reachable keep is 0\.06\d\d", message)
    assert call("plan", model, "--method", method, "--keep", "0.01").message == message


@pytest.mark.fault(54)
@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_the_smallest_keep_that_is_named_can_be_reached(method: str, model: Path, tmp_path: Path) -> None:
    message = refused(USAGE, model, "--method", method, "--keep", "0.01", where=tmp_path)
    smallest = re.search(r"smallest reachable keep is ([\d.]+)", message)
    assert smallest is not None
    accepted(model, "--method", method, "--keep", smallest[1], where=tmp_path)


def test_keep_between_factor_and_pivot_storage_is_refused(model: Path, tmp_path: Path) -> None:
    refused(USAGE, model, "--method", "two-sided", "--keep", "0.061", where=tmp_path)


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "sov"), "unknown method 'sov'; did you mean 'svd'?"),
        (("--method", "zzz"), "unknown method 'zzz'; known: " + ", ".join(sorted(all_methods()))),
        (("--preset", "fast"), "method svd has no presets (it does not train); leave --preset out"),
        (("--method", "soco", "--preset", "fats"), "method soco: unknown preset 'fats'; did you mean 'fast'?"),
        (("--method", "soco", "--set", "step=1"), "method soco: unknown option 'step'; did you mean 'steps'?"),
        (
            ("--set", "foo=1"),
            "method svd: unknown option 'foo'; known: allocation, generations, offspring, rank_multiple, rounds, "
            "storage",
        ),
        (("--set", "storage"), "--set storage: expected NAME=VALUE, e.g. --set steps=100"),
        (("--set", "=1"), "--set =1: expected NAME=VALUE"),
        (("--method", "soco", "--set", "steps=many"), "method soco: option steps takes int, got str 'many'"),
        (("--method", "soco", "--set", "steps=1.5"), "method soco: option steps takes int, got float 1.5"),
        (("--method", "soco", "--set", "steps=true"), "method soco: option steps takes int, got bool True"),
        (("--method", "soco", "--set", "steps=-1"), "method soco: steps must be in [0, 1000000], got -1"),
        (("--method", "soco", "--set", "learning_rate=NaN"), "learning_rate must be in [1e-09, 10.0], got nan"),
        (("--set", "storage=dense"), "method svd: storage must be one of factor, pivot, got 'dense'"),
        (("--recover", "kl:ten"), "the number of steps must be a whole number in [1, 1000000], got 'ten'"),
        (("--recover", "kl:3", "--recover", "blok"), "unknown recovery step 'blok'; did you mean 'block'?"),
        (("--recover", "refti"), "unknown recovery step 'refti'; did you mean 'refit'?"),
        (("--calib-windows", "0"), "calib_windows must be at least 1, got 0"),
        (("--calib-length", "1"), "calib_length must be at least 2, got 1"),
        (("--eval-windows", "-3"), "eval_windows must be at least 1, got -3"),
        (("--seed", "99999999999999999999"), "seed must be in [0, 2**63), got 99999999999999999999"),
        (("--device", "nonsense"), "--device nonsense: not a device that computes; use auto, cpu, cuda, cuda:N or mps"),
        (("--device", "meta"), "--device meta: not a device that computes"),
        (("--dtype", "nonsense"), "--dtype nonsense: not supported; known: bfloat16, float16, float32"),
        (("--dtype", "bfloat"), "--dtype bfloat: not supported; did you mean 'bfloat16'?"),
        (("--calib", "builtin:stdlb"), "unknown built-in text 'builtin:stdlb'; did you mean 'builtin:stdlib'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_options(options: tuple[str, ...], says: str, model: Path, tmp_path: Path) -> None:
    assert says in refused(USAGE, model, *options, where=tmp_path)


@pytest.mark.fault(68)
def test_unknown_flag(model: Path, tmp_path: Path) -> None:
    message = refused(USAGE, model, "--metod", "svd", where=tmp_path)
    assert "No such option: --metod" in message
    assert re.search(r"(Possible options:|Did you mean) .*--method", message)  # typer's words for one or several


@pytest.mark.fault(68)
def test_unknown_command() -> None:
    answer = call("compres")
    assert answer.code == USAGE
    assert "No such command 'compres'. Did you mean 'compress'?" in answer.message


@pytest.mark.fault(62)
def test_a_gpu_that_is_not_there(model: Path, tmp_path: Path) -> None:
    with mock.patch.object(torch.cuda, "device_count", return_value=0):
        message = refused(RESOURCE, model, "--device", "cuda:7", where=tmp_path)
    assert message == "error: --device cuda:7: this machine has 0 CUDA devices; use cpu"


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "MODEL", "--prompt", ""), "--prompt is empty; give at least one word"),
        (("generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"), "greater than or equal to 1"),
        (("generate", "MODEL", "--prompt", "x", "--max-new-tokens", "500"), "pass the 128 tokens that the model reads"),
        (("generate", "MODEL", "--prompt", "x", "--temperature", "-1"), "greater than or equal to 0"),
        (("eval", "MODEL", "--windows", "0"), "greater than or equal to 1"),
        (("eval", "MODEL", "--length", "1"), "greater than or equal to 2"),
        (("export", "MODEL", "--out", "OUT"), "not a spectrim folder; it is dense already"),
        (
            ("export", "MODEL", "--out", "OUT", "--to", "gguf"),
            "--to gguf: not supported; known: dense, size, portable, onnx",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_options_of_the_other_commands(arguments: tuple[str, ...], says: str, model: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    answer = call(*(places.get(argument, argument) for argument in arguments))
    assert answer.code == USAGE, answer.err
    assert answer.out == ""
    assert says in answer.message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("report", "FILE"), "is a file, not a folder; give folders that `spectrim compress` wrote"),
        (("report", "NONE"), "no such folder; give folders that `spectrim compress` wrote"),
        (("recipe", "show", "none.yaml"), "none.yaml: no such file (looked in "),
        (("verify", "NONE"), "1 problem; copy or download the folder again, or make the model anew: no such folder"),
        (("eval", "MODEL", "--against", "OTHER"), "OTHER 48: they cannot be compared; name the model that the folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_folders_and_files_of_the_other_commands(
    arguments: tuple[str, ...], says: str, model: Path, tmp_path: Path
) -> None:
    other = small_model(tmp_path / "other", vocab_size=48)
    (tmp_path / "text.txt").write_text("text")
    places = {"MODEL": model, "OTHER": other, "FILE": tmp_path / "text.txt", "NONE": tmp_path / "none"}
    answer = call(*(places.get(argument, argument) for argument in arguments))
    assert answer.code == INPUT, answer.err
    assert says.replace("OTHER", str(other)) in answer.message


# ---- the model


@pytest.mark.fault(16, 64)
@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("/nowhere/model", INPUT, "no such folder, and not a hub id (owner/name); give a model folder or builtin:tiny"),
        ("./model-of-mine", INPUT, "no such folder, and not a hub id"),
        ("gpt", INPUT, "gpt: no such folder, and not a hub id (owner/name)"),
        ("a/b/c", INPUT, "a/b/c: no such folder, and not a hub id"),
        ("~nobody-of-this-name/x", INPUT, "no such folder, and not a hub id"),
        ("x" * 300, INPUT, "no such folder, and not a hub id"),
        ("builtin:tny", USAGE, "unknown built-in model 'builtin:tny'; did you mean 'builtin:tiny'?"),
    ],
)
def test_a_model_that_is_not_there(name: str, code: int, says: str, tmp_path: Path) -> None:
    assert says in refused(code, name, where=tmp_path)
    for command in (("plan", name), ("inspect", name), ("eval", name), ("generate", name, "--prompt", "x")):
        answer = call(*command)
        assert (answer.code, answer.out) == (code, "")
        assert says in answer.message


@pytest.mark.fault(64)
def test_a_hub_id_that_the_hub_does_not_know(tmp_path: Path) -> None:
    gone = ConnectionError("404 Client Error.\nRepository Not Found.")
    with mock.patch("huggingface_hub.snapshot_download", side_effect=gone):
        message = refused(INPUT, "owner/name", where=tmp_path)
    assert "owner/name: no such folder here, and the hub gave ConnectionError: 404 Client Error. Repository" in message
    assert "Repository Not Found. Check the id, the network and your token, or pass a local folder" in message


@dataclass(frozen=True)
class Canary:
    """Unpickling this creates the file `path`."""

    path: str

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.mark.fault(12, 13)
def test_pickles_are_refused_and_never_opened(model: Path, tmp_path: Path) -> None:
    bird = tmp_path / "canary"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(str(bird))))
    (model / "model.safetensors").unlink()
    message = refused(INPUT, model, where=tmp_path)
    assert "holds only pickled weights ('pytorch_model.bin')" in message
    assert "spectrim never opens them" in message
    assert "model.save_pretrained(folder)" in message
    assert not bird.exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert bird.exists()  # the canary does sing


@pytest.mark.fault(14, 15)
def test_code_in_the_folder_is_never_run(model: Path, tmp_path: Path) -> None:
    bird = tmp_path / "canary"
    code = f"from pathlib import Path\nPath({str(bird)!r}).touch()\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    auto = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change_config(model, model_type="evil", auto_map=auto)
    message = refused(INPUT, model, where=tmp_path)
    assert "model type 'evil'" in message
    assert "Models that need remote code are not supported" in message
    assert not bird.exists()
    change_config(model, model_type="llama")  # known without the code
    accepted(model, where=tmp_path)
    assert not bird.exists()
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.fault(3)
def test_truncated_shard(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 10)
    message = refused(INPUT, model, where=tmp_path)
    assert f"model.safetensors: truncated: expected {size} bytes, found {size - 10}; download it again" in message


@pytest.mark.fault(8)
def test_missing_shard(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    message = refused(INPUT, tmp_path / "model", where=tmp_path)
    assert "1 of 2 shards in model.safetensors.index.json are missing; download them again" in message
    assert "model-00002-of-00002.safetensors" in message


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": 64}, "config.json disagrees with the tensors in 20 places, e.g. model.embed_tokens.weight: "
         "file [512, 32], config [512, 64]"),
        ({"vocab_size": 100}, "model.embed_tokens.weight: file [512, 32], config [100, 32]"),
        ({"num_hidden_layers": 3}, "config.json asks for 3 blocks (model.layers.0 to 2), the files hold 2"),
        ({"num_hidden_layers": 1}, "config.json asks for 1 blocks (model.layers.0 to 0), the files hold 2"),
        ({"attention_bias": True}, "8 tensors that the model needs are in no file, e.g. "
         "model.layers.0.self_attn.k_proj.bias"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "transformers accepts no config.json"),
        ({"model_type": "lama"}, "model type 'lama'"),
        ({"model_type": "t5"}, "transformers cannot build a causal language model from it"),
        ({"model_type": 7}, "model_type must be the name of an architecture, found '7'"),
        ({"quantization_config": [1]}, "transformers accepts no config.json"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_config_that_does_not_fit(fields: dict, says: str, model: Path, tmp_path: Path) -> None:
    change_config(model, **fields)
    assert says in refused(INPUT, model, where=tmp_path)
    answer = call("inspect", model)
    assert answer.code == INPUT, answer.err


@pytest.mark.fault(72)
def test_a_quantised_model(model: Path, tmp_path: Path) -> None:
    change_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised with gptq; spectrim starts from 16- or 32-bit weights" in refused(USAGE, model, where=tmp_path)


@pytest.mark.fault(72)
def test_a_compressed_model_as_input(model: Path, tmp_path: Path) -> None:
    accepted(model, where=tmp_path)
    message = refused(USAGE, tmp_path / "out", out=tmp_path / "twice", where=tmp_path)
    assert "already compressed by spectrim; start from the dense model" in message
    assert "spectrim export --to dense" in message


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("rank", "says"), [(3, "says rank 3"), (500, "so at most 32 is possible"), ("x", "expected codec in")]
)
def test_a_compressed_folder_that_was_edited(rank: object, says: str, model: Path, tmp_path: Path) -> None:
    accepted(model, where=tmp_path)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]["rank"] = rank
    path.write_text(json.dumps(config))
    text = str(small_text(tmp_path / "text.txt"))
    for command in (
        ("eval", "--no-speed", "--text", text),
        ("inspect",),
        ("generate", "--prompt", "x"),
        ("export", "--out", "OUT"),
    ):
        name, *rest = [str(tmp_path / "dense") if part == "OUT" else part for part in command]
        answer = call(name, tmp_path / "out", *rest)
        assert answer.code == INPUT, answer.err
        assert "model.layers.1.mlp.up_proj" in answer.message
    assert not (tmp_path / "dense").exists()


# ---- numbers that are none


@pytest.mark.fault(44)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [(), ("--method", "two-sided")], ids=" ".join)
def test_a_weight_that_is_not_finite(value: float, options: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.layers.1.", lambda tensor: tensor.view(-1)[5:7].fill_(value))
    message = refused(NUMERICAL, model, *options, where=tmp_path)
    assert "model.layers.1.self_attn.q_proj.weight: 2 of 1,024 values are NaN or Inf; none is allowed" in message
    assert "download it again" in message


@pytest.mark.fault(44)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_that_is_not_compressed_must_be_finite_too(name: str, model: Path, tmp_path: Path) -> None:
    """An Inf in the row of a rare token would be met by no calibration text."""
    change_weights(model, name, lambda tensor: tensor[-1:].fill_(torch.inf))
    message = refused(NUMERICAL, model, where=tmp_path)
    assert f"{name}: " in message
    assert "NaN or Inf; none is allowed" in message


@pytest.mark.fault(45)
def test_activations_that_overflow_name_the_first_layer(model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.layers.1.post_attention_layernorm", lambda tensor: tensor.fill_(3e38))
    message = refused(NUMERICAL, model, "--method", "svd-llm", where=tmp_path)
    assert "error: model.layers.1.mlp.gate_proj: the inputs are not finite in the batch that starts at" in message


@pytest.mark.fault(45)
def test_activations_that_overflow_without_statistics(model: Path, tmp_path: Path) -> None:
    change_weights(model, "model.norm.weight", lambda tensor: tensor.fill_(3e38))
    text = small_text(tmp_path / "text.txt")
    assert "logits are not finite" in refused(NUMERICAL, model, "--eval", text, where=tmp_path)


# ---- tokenizer and text


def test_without_a_tokenizer(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", tokenizer=False)
    for options in ((), ("--calib", "self", "--eval", "builtin:stdlib")):
        message = refused(INPUT, model, *options, where=tmp_path)
        assert f"no tokenizer in {model}" in message
        assert message.endswith("pass --tokenizer FOLDER, or --calib self --eval self, which need no tokenizer")
    report = accepted(model, "--calib", "self", where=tmp_path)
    assert report["text"]["calibration"]["source"] == "self"
    assert report["quality"] is None
    shutil.rmtree(tmp_path / "out")
    words = tmp_path / "words"
    words.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(small_model(tmp_path / "other") / name, words / name)
    assert accepted(model, "--tokenizer", words, where=tmp_path)["text"]["calibration"]["windows"] == 8
    assert call("generate", model, "--tokenizer", words, "--prompt", "x", "--max-new-tokens", "1").code == 0


@pytest.mark.fault(17)
def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", vocab_size=100)
    says = "the model knows 0 to 99: it belongs to another model; pass the right one as --tokenizer"
    assert says in refused(INPUT, model, where=tmp_path)
    text = small_text(tmp_path / "text.txt")
    for command in (("eval", model, "--text", text), ("generate", model, "--prompt", "hello world")):
        answer = call(*command)
        assert answer.code == INPUT, answer.err
        assert says in answer.message


@pytest.mark.fault(47, 69)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no text in it (0 characters, all white space); give another file"),
        (b" \n\n\t", "no text in it (4 characters, all white space)"),
        (b"a", "1 tokens of text; at least 2 are needed; give a longer text"),
        (b"text\0text" * 10, "binary, not text (NUL at character 4); give a UTF-8 text file"),
        (b"\xff\xfe\x90" * 10, "not UTF-8 (byte 0xff: invalid start byte); convert it"),
    ],
)
@pytest.mark.parametrize("use", ["--calib", "--eval"])
def test_text(use: str, content: bytes, says: str, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    message = refused(INPUT, model, use, text, where=tmp_path)
    assert str(text) in message
    assert says in message


@pytest.mark.fault(69)
@pytest.mark.parametrize("name", ["missing.txt", "missing"])
def test_missing_text(name: str, model: Path, tmp_path: Path) -> None:
    message = refused(INPUT, model, "--calib", name, where=tmp_path)
    assert f"{name}: no such file or folder (looked in {Path.cwd()})" in message


@pytest.mark.fault(47)
@pytest.mark.parametrize("method", ["svd-llm", "two-sided", "asvd"])
def test_a_text_shorter_than_a_layer_is_wide_works_and_says_so(method: str, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def double(x): return 2 * x")
    answer = call("compress", model, "--out", tmp_path / "out", *PLAIN, "--method", method, "--calib", text)
    assert answer.code == 0, answer.err
    warnings = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert re.fullmatch(r"asked for 8 windows of 64 tokens, the text holds one shorter window of \d+", warnings[0])
    assert re.match(r"\d+ calibration tokens for layers with up to 48 inputs: the statistics are rank-def", warnings[1])
    assert all(f"warning: {warning}" in answer.err for warning in warnings[:2])


# ---- the output folder


@pytest.mark.fault(21)
def test_an_output_folder_that_exists(model: Path, tmp_path: Path) -> None:
    out = small_model(tmp_path / "out", seed=1)
    message = refused(USAGE, model, where=tmp_path)
    assert re.search(r"out: exists and holds \d entries; choose another --out, or add --overwrite to replace", message)
    old = hashes(out)
    accepted(model, "--overwrite", where=tmp_path)
    assert hashes(out).keys() != old.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.fault(21)
def test_overwrite_of_a_folder_that_is_no_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    assert "--overwrite replaces models only" in refused(USAGE, model, "--overwrite", where=tmp_path)


@pytest.mark.fault(21)
def test_an_output_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "out: exists and is not a folder; choose another --out" in refused(USAGE, model, where=tmp_path)


@pytest.mark.fault(20)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=str)
def test_an_output_at_or_in_the_source(overwrite: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    says = "is the source model itself, which is never changed; choose another --out"
    assert says in refused(USAGE, model, *overwrite, out=model, where=tmp_path)
    assert "lies inside the source model" in refused(USAGE, model, *overwrite, out=model / "small", where=tmp_path)
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    assert refused(USAGE, model, *overwrite, out=tmp_path / "link", where=tmp_path)
    assert "lies inside the source model" in refused(
        USAGE, tmp_path / "link", *overwrite, out=model / "small", where=tmp_path
    )


def test_export_to_a_folder_that_exists_or_is_the_source(model: Path, tmp_path: Path) -> None:
    accepted(model, where=tmp_path)
    before = hashes(tmp_path)
    for out, says in ((model, "add --overwrite"), (tmp_path / "out", "is the source model itself")):
        answer = call("export", tmp_path / "out", "--out", out)
        assert answer.code == USAGE
        assert says in answer.message
    assert hashes(tmp_path) == before


@pytest.mark.fault(37)
def test_too_little_space(model: Path, tmp_path: Path) -> None:
    with mock.patch.object(target.shutil, "disk_usage", return_value=SimpleNamespace(total=10, used=0, free=10)):
        message = refused(RESOURCE, model, where=tmp_path)
        assert "out: needs 0.00 GB (140,377 bytes) on this disk, 0.00 GB (10 bytes) are free" in message
        assert "free some space or choose another --out" in message


@pytest.mark.fault(36)
def test_a_disk_that_fills_while_writing(model: Path, tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with mock.patch("spectrim.job.write_manifest", side_effect=full):
        message = refused(RESOURCE, model, where=tmp_path)
    assert "No space left on device (errno 28) after 0.00 GB" in message
    assert "now removed; all of it takes about 0.00 GB (" in message
    assert message.endswith("; free some space or choose another --out")


@pytest.mark.fault(39)
def test_a_parent_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    with mock.patch.object(target.os, "access", return_value=False):
        message = refused(RESOURCE, model, out=tmp_path / "new" / "out", where=tmp_path)
    assert f"{tmp_path}: cannot be written; give yourself permission or choose another --out" in message
    (tmp_path / "file").write_text("x")
    message = refused(RESOURCE, model, out=tmp_path / "file" / "out", where=tmp_path)
    assert "file: is not a folder, so nothing can be written in it" in message


@pytest.mark.fault(59, 60)
def test_out_of_memory_is_no_bug_of_ours(model: Path, tmp_path: Path) -> None:
    for error in (torch.OutOfMemoryError("tried to allocate 3 GiB"), MemoryError("3 GiB")):
        with mock.patch.object(job, "compress_model", side_effect=error):
            message = refused(RESOURCE, model, where=tmp_path)
        assert "out of memory" in message
        assert "take fewer or shorter windows, or --device cpu" in message


def test_a_bug_of_ours_says_so_and_publishes_nothing(model: Path, tmp_path: Path) -> None:
    with mock.patch.object(documents, "model_card", side_effect=KeyError("perplexity")):
        never = ("--save-every", "1e9")
        answer = call("compress", model, "--out", tmp_path / "out", *PLAIN, *never, "--method", "svd")
    assert answer.code == INTERNAL
    assert "internal error: KeyError: 'perplexity'" in answer.err
    assert "run again with SPECTRIM_DEBUG=1 and report the traceback" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- signals


@dataclass(frozen=True)
class Stopped:
    """A `compress` child that got a signal."""

    code: int
    err: str
    command: list[str]
    names: list[str]
    source_is_unchanged: bool
    out: Path


SIGNALS = {
    "SIGINT": (signal.SIGINT, "calibrate", ("--method", "svd-llm", "--calib-windows", "4000", "--calib-length", "128")),
    "SIGTERM": (signal.SIGTERM, "reload in a fresh process", ("--method", "svd")),
    "SIGKILL": (signal.SIGKILL, "reload in a fresh process", ("--method", "svd")),
}


def wait_for(stage: str, stream: IO[str]) -> str:
    """What was printed up to and with the line of `stage`."""
    seen = ""
    for line in stream:
        seen += line
        if stage in line:
            return seen
    raise AssertionError(f"the child ended before {stage!r}:\n{seen}")


def spectrim_in_a_fork(*words: str) -> tuple[int, IO[str]]:
    """The process that works on a command in a session of its own, and what it says on its standard error."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            os.dup2(write, 2)
            sys.stdout, sys.stderr = io.StringIO(), open(2, "w", closefd=False)  # noqa: SIM115  as long as the process
            sys.argv = ["spectrim", *words]
            with mock.patch.object(reloaded, "subprocess", subprocess):
                cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    return pid, open(read, encoding="utf-8")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stopped]:
    """Three children, stopped at the stage that `SIGNALS` names; forks, which need not import torch."""
    results = {}
    for name, (number, stage, options) in SIGNALS.items():
        where = tmp_path_factory.mktemp(name.lower())
        model = small_model(where / "model")
        command = [str(model), "--out", str(where / "out"), "--eval", "none", *options]
        before = hashes(model)
        pid, stderr = spectrim_in_a_fork("compress", *command)
        with stderr:
            err = wait_for(stage, stderr)
            os.kill(pid, number)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # a killed parent leaves its own child behind, which holds the pipe
            err += stderr.read()
        names = sorted(path.name for path in where.iterdir())
        results[name] = Stopped(code, err, command, names, hashes(model) == before, where / "out")
    return results


@pytest.mark.fault(27)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_polite_signal(name: str, code: int, stopped: dict[str, Stopped]) -> None:
    run = stopped[name]
    assert run.code == code, run.err
    assert run.source_is_unchanged
    assert [n for n in run.names if n != "out.resume"] == ["model"]
    if name == "SIGINT":  # between two batches
        told = f"of statistics 0 is kept in {run.out}.resume. To go on:"
    elif "out.resume" in run.names:  # while the result is loaded again, by a machine so slow that a state was worth it
        told = f"is kept in {run.out}.resume. To go on:"
    else:
        told = "nothing was published. To start again:"
    assert f"error: stopped by {name}; " in run.err
    assert f"{told} spectrim compress {run.command[0]}" in run.err
    assert run.err.rstrip().endswith(" ".join(run.command))
    assert "Traceback" not in run.err


@pytest.mark.fault(24)
def test_sigkill(stopped: dict[str, Stopped]) -> None:
    run = stopped["SIGKILL"]
    assert run.code == -signal.SIGKILL
    assert run.source_is_unchanged
    assert [name for name in run.names if not name.startswith("out.partial-")] == ["model", "out.resume"]


def test_a_library_that_catches_everything_does_not_catch_a_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    # As the tokenizer and the hub client are guarded:
    with pytest.raises(Interrupted) as caught, terminal.stoppable(), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
