"""SGLang's own loader and layers on the CPU: it finds the plugin by its entry point, and every layer is transformers'.

    tests/matrix/run.sh sglang      makes an environment with SGLang's Python code and runs this file in it

Its kernels are for GPUs and are not installed: no server is started, no attention is run. Skipped without SGLang.
"""

import importlib.machinery
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import transformers.image_utils  # looks for torchvision, before the stand-in is there
from transformers import AutoModelForCausalLM

import spectrim
from command_line import TINY

if find_spec("sglang") is None:
    pytest.skip("needs sglang", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Nothing(ModuleType):
    """A module that has whatever it is asked for: SGLang imports torchvision, whose builds choose another torch."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in_for_torchvision() -> None:
    assert not transformers.utils.is_torchvision_available()  # and transformers remembers
    for name in ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional"):
        module = Nothing(f"torchvision{name}")
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SGLang's loader as a function of a folder."""
    stand_in_for_torchvision()
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.model_loader import get_model
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()  # as the server does
    meeting = f"file://{tmp_path_factory.mktemp('meet') / 'point'}"

    def run(folder: Path) -> Any:
        arguments = ServerArgs(model_path=str(folder), device="cpu", attention_backend="torch_native", dtype="float32")
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, distributed_init_method=meeting, local_rank=0, backend="gloo")
            initialize_model_parallel(backend="gloo")
        return get_model(
            model_config=ModelConfig.from_server_args(arguments),
            load_config=LoadConfig(),
            device_config=DeviceConfig("cpu"),
        )

    return run


def compress(folder: Path, method: str, **options: Any) -> Path:
    small = spectrim.compress(
        "builtin:tiny", keep=0.8, method=method, options=options, eval="none", calib_windows=16, calib_length=64
    )
    small.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@torch.no_grad()
def test_every_layer_is_that_of_transformers(storage, load, tmp_path):
    """Ranks by global allocation: different in every part of every fused layer."""
    folder = compress(tmp_path / "small", "two-sided", storage=storage)
    served, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    x, y = torch.randn(5, plain.config.hidden_size), torch.randn(5, plain.config.intermediate_size)
    for theirs, ours in zip(served.model.layers, plain.model.layers, strict=True):
        attention, mlp = ours.self_attn, ours.mlp
        assert type(theirs.self_attn.qkv_proj.quant_method).__module__ == "spectrim.integrations.sglang"
        for layer, given, parts in (
            (theirs.self_attn.qkv_proj, x, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (theirs.self_attn.o_proj, x, (attention.o_proj,)),
            (theirs.mlp.gate_up_proj, x, (mlp.gate_proj, mlp.up_proj)),
            (theirs.mlp.down_proj, y, (mlp.down_proj,)),
        ):
            found, _ = layer(given)
            torch.testing.assert_close(found, torch.cat([part(given) for part in parts], -1), atol=1e-6, rtol=1e-5)


def test_a_folder_of_another_storage_is_refused_with_what_to_do(load, tmp_path):
    folder = compress(tmp_path / "small", "rtn", group_size=16)
    with pytest.raises(Exception, match=r"layers stored as packed are not served.*--to dense"):
        load(folder)
