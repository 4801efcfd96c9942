"""Decoding and prefill of compressed models against the byte and operation floors of the device.

    python benchmarks/decode.py --out results/decode.json --seconds 150       one GPU
    python benchmarks/decode.py --candidates --out results/decode-candidates.json --seconds 240
    python benchmarks/decode.py --quick                                       a tiny model on the CPU: does it run

A Llama of 7B shape with random weights is built by the format's own code (ranks from the keep). Its decoder layers are
compiled by torch.compile one by one (the same code for all) over transformers' static cache, and a whole step is
recorded as one CUDA graph, dense and compressed alike. Ceilings (memory, matmul) are measured first. The floor of
a decoded token is all weights and the key/value cache read once at the best rate of memory; that of prefill all
products at the matmul rate. The JSON file is written after every row; rows for which the seconds did not suffice are
named. `--candidates` times other forms instead: outputs of pivot layers in prefill, kernels of low-rank and of whole
weights in codes.
"""

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import attempted
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spectrim.integrations.transformers import SpectrimConfig, install_modules
from spectrim.linalg.pivot import pack_mask
from spectrim.linalg.shared import group_cost, pivoted_group_cost
from spectrim.models.walk import Layer, find_layers
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.choice import Choice, choose, seconds_in_graph
from spectrim.nn.kernels.launch import has_pdl, missing
from spectrim.nn.kernels.many import choose_many
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.quantised import QuantisedPivotLinear
from spectrim.nn.shared import InputPivots, SharedLinear

SHAPE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
            "vocab_size": 32000, "num_hidden_layers": 32}  # fmt: skip
SHAPE_QUICK = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4,
               "vocab_size": 256, "num_hidden_layers": 2}  # fmt: skip
CONTEXT, POSITION = 256, 64
"""Tokens that the static cache holds, and how many stand in it when decoding is timed."""
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class Bench:
    """Rows so far, the device, the ceilings and the clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.seconds = arguments.out, arguments.seconds
        self.began = time.perf_counter()
        self.quick, self.only = arguments.quick, arguments.only
        self.device = torch.device("cpu" if arguments.quick else "cuda")
        self.shape = {**(SHAPE_QUICK if self.quick else SHAPE_7B)}
        if arguments.layers:
            self.shape["num_hidden_layers"] = arguments.layers
        self.dtype = torch.float32 if self.quick else torch.bfloat16
        self.facts: dict[str, Any] = {"rows": [], "skipped": [], "command": arguments.command}
        self.copy_rate = self.matmul_rate = 0.0
        self.backend = "aot_eager" if self.quick else "inductor"  # the compiler for the CPU takes minutes

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def row(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """One row, or why there is none; written at once."""
        if self.only and name != "ceilings" and not any(part in name for part in self.only):
            return
        if self.left() < 0:
            self.facts["skipped"].append(name)
        else:
            start = time.perf_counter()
            made = attempted(make)
            self.facts["rows"].append({"row": name, **made, "took_s": round(time.perf_counter() - start, 1)})
            print(json.dumps({k: v for k, v in self.facts["rows"][-1].items() if k != "choices"}), flush=True)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.facts, indent=1) + "\n")

    def clock(self, run: Callable[[], Any], *, replays: int = 5) -> float:
        """Seconds of `run`: as a CUDA graph, or once by the clock on the CPU."""
        if self.device.type == "cuda":
            return seconds_in_graph(run, replays=replays)
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def ceilings(bench: Bench) -> dict[str, Any]:
    """Bytes a second and operations a second: the best of what plain large operations reach.

    Bytes: a copy, counted read and written, a product that writes what it reads, and a sum, which only reads.
    """
    count, side = (2**20, 256) if bench.quick else (2**32, 8192)
    a = torch.empty(count // 2, device=bench.device, dtype=bench.dtype).normal_()
    b = torch.empty_like(a)
    total = torch.empty((), device=bench.device, dtype=torch.float32)
    rates = {
        "copy": 2 * a.nbytes / bench.clock(lambda: b.copy_(a)),
        "product": 2 * a.nbytes / bench.clock(lambda: torch.mul(a, 2, out=b)),
        "sum": a.nbytes / bench.clock(lambda: torch.sum(a, dtype=torch.float32, dim=0, out=total)),
    }
    bench.copy_rate = max(rates.values())
    m, n = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    bench.matmul_rate = 2 * side**3 / bench.clock(lambda: m @ n)
    return {"tb_s": {name: rate / 1e12 for name, rate in rates.items()}, "matmul_tflop_s": bench.matmul_rate / 1e12,
            "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
            "torch": torch.__version__}  # fmt: skip


def rank_for(outputs: int, inputs: int, keep: float, storage: str, multiple: int) -> int:
    """The largest rank whose stored numbers are within `keep`, down to a multiple."""
    budget = keep * outputs * inputs
    if storage.endswith("pivot"):
        total = outputs + inputs
        rank = int((total - (total**2 - 4 * budget) ** 0.5) / 2)
    else:
        rank = int(budget / (outputs + inputs))
    return max(multiple, rank // multiple * multiple)


def entry_for(outputs: int, inputs: int, keep: float, storage: str, multiple: int) -> dict[str, Any]:
    """The layer's line of config.json; `storage` is factor, pivot, factor-8, factor-4, packed-4, ..."""
    name, _, bits = storage.partition("-")
    rank = rank_for(outputs, inputs, keep, name, multiple)
    if not bits:
        return {"codec": name, "rank": rank, "bias": False}

    def store(width: int) -> dict[str, Any]:
        group = next(g for g in (128, 64, 32, 16, 0) if not g or width % g == 0)
        return {"kind": "uniform", "bits": int(bits), "group_size": group, "symmetric": False}

    if name == "packed":
        return {"codec": name, "rank": min(outputs, inputs), "bias": False, "correction": 0, "base": store(inputs)}
    parts = ("V", "U") if name == "factor" else ("pivot", "rest")
    return {"codec": f"quantised-{name}", "rank": rank, "bias": False, parts[0]: store(inputs), parts[1]: store(rank)}


def shared_entries(layers: Sequence[Layer], keep: float, storage: str, multiple: int) -> dict[str, dict[str, Any]]:
    """Lines of config.json of q, k, v and of gate, up: one right factor a group, of the rank that `keep` allows."""
    found = {}
    cost = group_cost if storage == "shared" else pivoted_group_cost
    by_name = {layer.name: layer for layer in layers}
    for parts in GROUPS:
        for owner in (name for name in by_name if len(parts) > 1 and name.endswith(parts[0])):
            names = [owner.removesuffix(parts[0]) + part for part in parts]
            outputs, inputs = [by_name[name].outputs for name in names], by_name[owner].inputs
            ranks = torch.arange(multiple, inputs, multiple)
            fits = cost(outputs, inputs, ranks) <= keep * inputs * sum(outputs)
            rank = int(ranks[fits].max())
            for name in names:
                basis = None if name == owner else owner
                found[name] = {"codec": storage, "rank": rank, "bias": False, "basis": basis}
    return found


def build(bench: Bench, keep: float, storage: str, multiple: int = 16) -> LlamaForCausalLM:
    """A model of random weights, its decoder linears in `storage`; weights straight on the device."""
    config = LlamaConfig(**bench.shape, max_position_embeddings=4096)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(bench.dtype)
    if keep < 1:
        layers = find_layers(model).layers
        alone = {"shared": "factor", "shared-pivot": "pivot"}.get(storage, storage)
        entries = {la.name: entry_for(la.outputs, la.inputs, keep, alone, multiple) for la in layers}
        if alone != storage:
            entries |= shared_entries(layers, keep, storage, multiple)
        install_modules(model, SpectrimConfig(modules=entries))
    model.to_empty(device=bench.device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(bench.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = 1e-3 if name.endswith("scales") else parameter.shape[-1] ** -0.5
            parameter.normal_(0, small) if parameter.ndim > 1 else parameter.fill_(1.0)
        for module in model.modules():
            fill_codes(module)
            if isinstance(module, SharedLinear):
                module.link(model)
    return model.eval()


def fill_codes(module: nn.Module) -> None:
    """Random codes and pivots, which are buffers."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dtype == torch.uint8 and name in ("codes", "zeros"):
            buffer.random_(0, 256)
    if isinstance(module, PivotLinear | QuantisedPivotLinear | InputPivots):
        count = module.in_features if isinstance(module, InputPivots) else module.out_features
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.randperm(count)[: module.rank]] = True
        module.mask.copy_(pack_mask(mask))
        module.refresh_order()


class Step:
    """Layers compiled one by one over static caches; `run` is a step from tokens to the next tokens."""

    def __init__(self, bench: Bench, model: LlamaForCausalLM, lines: int, tokens: int, *, options: Any = None) -> None:
        self.model, self.lines, self.tokens = model, lines, tokens
        self.ids = torch.randint(0, bench.shape["vocab_size"], (lines, tokens), device=bench.device)
        length = max(CONTEXT, tokens)
        one = copy.deepcopy(model.config)
        one.num_hidden_layers = 1
        self.caches = [StaticCache(config=one, max_cache_len=length) for _ in model.model.layers]
        for layer in model.model.layers:
            layer.self_attn.layer_idx = 0  # each layer has a cache of its own: one compiled code serves all
        start = 0 if tokens > 1 else POSITION
        self.start = start
        self.positions = torch.arange(start, start + tokens, device=bench.device)[None]
        self.mask = None
        if tokens == 1:
            self.mask = torch.ones(lines, 1, 1, length, dtype=torch.bool, device=bench.device)
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        self.cache_bytes = len(self.caches) * 2 * lines * heads * width * length * bench.dtype.itemsize
        empty = torch.zeros(lines, heads, 1, width, dtype=bench.dtype, device=bench.device)
        for cache in self.caches:
            cache.layers[0].lazy_initialization(empty, empty)
        self.rewind()
        torch._dynamo.reset()
        self.layer = torch.compile(call_layer, dynamic=False, fullgraph=True, backend=bench.backend, options=options)

    def rewind(self) -> None:
        for cache in self.caches:
            count = getattr(cache.layers[0], "cumulative_length", None)
            if isinstance(count, torch.Tensor):
                count.fill_(self.start)

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        decoder = self.model.model
        hidden = decoder.embed_tokens(self.ids)
        turned = decoder.rotary_emb(hidden, self.positions)
        if self.tokens > 1:
            self.rewind()
        for layer, cache in zip(decoder.layers, self.caches, strict=True):
            hidden = self.layer(layer, hidden, self.mask, self.positions, cache, turned)
        return self.model.lm_head(decoder.norm(hidden[:, -1:])).argmax(-1)


def call_layer(layer: nn.Module, hidden: Any, mask: Any, positions: Any, cache: Any, turned: Any) -> Any:
    """One decoder layer, the function that is compiled."""
    return layer(hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                 cache_position=positions[0], position_embeddings=turned)  # fmt: skip


def groups_of(model: LlamaForCausalLM) -> list[list[StoredLinear]]:
    """Layers that read one input, by name: q, k, v; o; gate, up; down."""
    found = []
    for layer in model.model.layers:
        by_name = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        found += [[by_name[name] for name in names] for names in GROUPS]
    return [group for group in found if all(isinstance(module, StoredLinear) for module in group)]


def stored_bytes(model: nn.Module) -> int:
    """Of all tensors of the file."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def products_per_token(model: LlamaForCausalLM) -> int:
    """Multiplications and additions of all linear layers of the decoder for one token."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            if isinstance(module, SharedLinear):
                read = sum(p.shape[1] for p in module.V.parameters()) if module.basis is None else 0
                count += 2 * module.rank * (read + module.out_features)
                continue
            rest = module.out_features - (module.rank if "pivot" in module.codec else 0)
            count += 2 * module.rank * (module.in_features + rest)
        elif isinstance(module, nn.Linear) and ".layers." in name and not name.endswith(("U", "V", "pivot", "rest")):
            count += 2 * module.weight.numel()
    return count


def whole(bench: Bench, keep: float, storage: str, *, kernels: bool, rows: tuple[int, ...], prefill: int,
          multiple: int = 16, options: Any = None) -> dict[str, Any]:  # fmt: skip
    """Decode at each number of rows, and prefill, of one model."""
    gpu = bench.device.type == "cuda"
    before = memory_of_others(bench)
    model = build(bench, keep, storage, multiple)
    made: dict[str, Any] = {"keep": keep, "storage": storage if keep < 1 else "dense", "kernels": kernels}
    weights = stored_bytes(model)
    made["stored_gb"] = weights / 1e9
    if gpu:
        torch.cuda.synchronize()
        made["memory_over_stored"] = (torch.cuda.memory_allocated() - before) / weights
    if kernels:
        start = time.perf_counter()
        groups = groups_of(model)
        choices = choose(groups, rows, pdl=has_pdl(bench.device)) if rows else []
        if prefill:
            choices += choose_many((layer for group in groups for layer in group), prefill)
        made["choosing_s"] = round(time.perf_counter() - start, 1)
        made |= facts_of_choices(choices)
    # Of the embedding one row is read; nothing else is read in part.
    read = weights - model.model.embed_tokens.weight.nbytes
    for lines in rows:
        start = time.perf_counter()
        step = Step(bench, model, lines, 1, options=options)
        seconds = bench.clock(step.run)
        floor = (read + step.cache_bytes) / bench.copy_rate
        made[f"decode_{lines}"] = {
            "ms": seconds * 1e3, "tokens_s": lines / seconds, "floor_ms": floor * 1e3, "of_floor": floor / seconds,
            "compile_and_time_s": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        del step
    if prefill:
        start = time.perf_counter()
        step = Step(bench, model, 1, prefill, options=options)
        seconds = bench.clock(step.run, replays=2)
        config = model.config
        attention = 2 * prefill**2 * config.hidden_size * config.num_hidden_layers  # causal: half of 4 S^2 H
        work = products_per_token(model) * prefill + attention
        made["prefill"] = {"ms": seconds * 1e3, "tokens_s": prefill / seconds,
                           "floor_ms": work / bench.matmul_rate * 1e3, "of_floor": work / bench.matmul_rate / seconds,
                           "compile_and_time_s": round(time.perf_counter() - start, 1)}  # fmt: skip
    return made


def memory_of_others(bench: Bench) -> int:
    """Bytes on the GPU now that everything that models before this one have left behind is gone."""
    torch._dynamo.reset()  # compiled code refers to the layers it was compiled for
    gc.collect()  # and a group of layers and its layers to each other
    if bench.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def facts_of_choices(choices: list[Choice]) -> dict[str, Any]:
    """What was timed and taken, for the file and for people."""
    return {
        "choices": [choice._asdict() for choice in choices],
        "chosen": [f"{c.shapes[0][0]} x{len(c.shapes)} {c.shapes[0][1]}x{c.shapes[0][2]} rank {c.shapes[0][3]}"
                   f" rows {c.lines}: torch {c.torch_us:.1f} us, kernel {c.kernel_us or 0:.1f} us,"
                   f" dense {'no memory' if c.dense_us is None else f'{c.dense_us:.1f} us'}"
                   f"{' SLOWER' if c.slower_than_dense else ''}, {c.tiles}"
                   f" {c.note}" for c in choices],
    }  # fmt: skip


def micro(bench: Bench, outputs: int, inputs: int, keep: float, storage: str, lines: int) -> dict[str, Any]:
    """One layer shape: dense, its products by torch, the same compiled; microseconds a layer, weights from memory."""
    copies = 2 if bench.quick else max(4, int(4e8 / (2 * outputs * inputs * keep)))
    x = torch.randn(lines, inputs, dtype=bench.dtype, device=bench.device)
    given = {"device": bench.device, "dtype": bench.dtype}
    dense = [nn.Linear(inputs, outputs, bias=False, **given) for _ in range(copies)]
    entry = entry_for(outputs, inputs, keep, storage, 16)
    kind = PivotLinear if storage == "pivot" else LowRankLinear
    small = [kind.from_entry(inputs, outputs, entry, **given) for _ in range(copies)]
    for layer in small:
        fill_codes(layer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, y: layer(y), dynamic=False, backend=bench.backend)
    with torch.no_grad():
        runs = {
            "dense_us": lambda: [layer(x) for layer in dense],
            "torch_us": lambda: [layer(x) for layer in small],
            "compiled_us": lambda: [compiled(layer, x) for layer in small],
        }
        made: dict[str, Any] = {name: bench.clock(run) / copies * 1e6 for name, run in runs.items()}
    size = stored_bytes(small[0])
    rest = outputs - (entry["rank"] if storage == "pivot" else 0)
    floor = max(size / bench.copy_rate, 2 * entry["rank"] * (inputs + rest) * lines / bench.matmul_rate)
    return {"shape": f"{outputs}x{inputs}", "rank": entry["rank"], "lines": lines, "floor_us": floor * 1e6, **made}


def alignment(bench: Bench, ranks: tuple[int, ...], lines: int) -> dict[str, Any]:
    """Microseconds of two factors of 4096 x 4096 by their rank."""
    width = 64 if bench.quick else 4096
    made: dict[str, Any] = {"lines": lines}
    x = torch.randn(lines, width, dtype=bench.dtype, device=bench.device)
    for rank in ranks:
        copies = 2 if bench.quick else 16 if lines < 64 else 4
        layers = [LowRankLinear(width, width, rank, bias=False, device=bench.device, dtype=bench.dtype)
                  for _ in range(copies)]  # fmt: skip
        with torch.no_grad():
            made[f"rank_{rank}_us"] = bench.clock(lambda layers=layers: [layer(x) for layer in layers]) / copies * 1e6
    return made


def main(bench: Bench) -> None:
    """All rows, the most asked for first; the kernels after what does not depend on them."""
    able = missing() is None and not bench.quick
    bench.row("ceilings", lambda: ceilings(bench))
    bench.row("dense", lambda: in_torch(bench, 1.0, "dense"))
    for storage in ("pivot", "factor"):
        bench.row(f"keep 0.5 {storage}", lambda s=storage: in_torch(bench, 0.5, s))
    ranks = (16, 15) if bench.quick else (1024, 1023, 1020, 1016, 1008, 1000, 992, 960, 896)
    for lines in (1, 16, 2048):
        bench.row(f"ranks, {lines} rows", lambda n=lines: alignment(bench, ranks, n))
    for storage in ("pivot", "factor") if able else ():
        bench.row(f"keep 0.5 {storage}, kernels", lambda s=storage: by_kernels(bench, 0.5, s))
    for storage in ("shared", "shared-pivot"):
        bench.row(f"keep 0.5 {storage}", lambda s=storage: in_torch(bench, 0.5, s))
        if able:
            bench.row(f"keep 0.5 {storage}, kernels", lambda s=storage: by_kernels(bench, 0.5, s))
    for storage in ("factor-8", "factor-4"):
        name = f"keep 0.5 {storage}{', kernels' if able else ''}"
        bench.row(name, lambda s=storage: by_kernels(bench, 0.5, s, rows=(1,), multiple=32, kernels=able))
    for keep, storage in ((0.8, "pivot"), (0.3, "pivot"), (0.8, "factor"), (0.3, "factor")):
        bench.row(f"keep {keep} {storage}", lambda k=keep, s=storage: in_torch(bench, k, s))
        if able:
            bench.row(f"keep {keep} {storage}, kernels", lambda k=keep, s=storage: by_kernels(bench, k, s))
    single_layers(bench)
    tuned = {"coordinate_descent_tuning": True}
    for keep, storage, kernels in ((1.0, "dense", False), (0.5, "factor", False), (0.5, "factor", True), (0.5, "pivot", True)) if able else ():  # noqa: E501  # fmt: skip
        name = f"keep {keep} {storage}{', kernels' if kernels else ''}, coordinate descent"
        given = {"rows": (1,), "kernels": kernels, "options": tuned}
        bench.row(name, lambda k=keep, s=storage, g=given: by_kernels(bench, k, s, **g))
    overlapped = {"triton.enable_pdl": True}
    for keep, storage, kernels in ((1.0, "dense", False), (0.5, "factor", True)) if able else ():
        name = f"keep {keep} {storage}{', kernels' if kernels else ''}, overlapping launches"
        given = {"rows": (1,), "kernels": kernels, "options": overlapped}
        bench.row(name, lambda k=keep, s=storage, g=given: by_kernels(bench, k, s, **g))
    table(bench)


CANDIDATES = ("prefill", "codes", "packed")


def candidates(bench: Bench, names: list[str]) -> None:
    """Other forms of layers, each beside what it must beat; those asked for most come first."""
    able = missing() is None and not bench.quick
    long = 32 if bench.quick else 2048
    bench.row("ceilings", lambda: ceilings(bench))
    few = (1, 4, 16)
    dense_prefill = long if "prefill" in names else 0
    bench.row("dense", lambda: whole(bench, 1.0, "dense", kernels=False, rows=few, prefill=dense_prefill))

    def model(storage: str, *, keep: float = 0.5, kernels: bool = True, **given: Any) -> None:
        kernels = kernels and able
        name = f"keep {keep} {storage}{', kernels' if kernels else ''}"
        bench.row(name, lambda: whole(bench, keep, storage, kernels=kernels, multiple=32, **given))

    if "prefill" in names:
        model("pivot", rows=(), prefill=long)
        model("pivot", rows=(), prefill=long, kernels=False)
    if "codes" in names:
        model("factor-4", rows=few, prefill=0)
    if "packed" in names:
        model("packed-4", rows=(1, 16), prefill=0)
    if "codes" in names:
        model("factor", rows=(1, 16), prefill=0)
        model("factor-8", rows=(1, 16), prefill=0)
        model("pivot-4", rows=(1, 16), prefill=0)
    if "packed" in names:
        model("packed-8", rows=(1, 16), prefill=0)
        model("packed-3", rows=(1, 16), prefill=0)
    for row in bench.facts["rows"]:
        for line in row.get("chosen", ()):
            print(f"{row['row']}: {line}"[:300])
    table(bench)


def in_torch(bench: Bench, keep: float, storage: str) -> dict[str, Any]:
    """A whole model by torch.compile alone."""
    return whole(bench, keep, storage, kernels=False, rows=(1, 16), prefill=32 if bench.quick else 2048)


def by_kernels(bench: Bench, keep: float, storage: str, **given: Any) -> dict[str, Any]:
    """A whole model with the kernels where they win; they have no part in prefill."""
    return whole(bench, keep, storage, **{"kernels": True, "rows": (1, 16), "prefill": 0, **given})


def single_layers(bench: Bench) -> None:
    """The three shapes of the model by themselves."""
    wide, tall = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    for storage in ("factor", "pivot"):
        for shape in ((wide, wide), (tall, wide), (wide, tall)):
            for lines in (1, 2048):
                name = f"layer {shape[0]}x{shape[1]} {storage}, {lines} rows"
                bench.row(name, lambda s=shape, n=lines, t=storage: micro(bench, *s, 0.5, t, n))


def table(bench: Bench) -> None:
    """The rows of whole models, beside the dense one."""
    found = [row for row in bench.facts["rows"] if "keep" in row]
    dense = next((row for row in found if row["keep"] == 1.0), {})
    print(f"memory {bench.copy_rate / 1e12:.2f} TB/s, matmul {bench.matmul_rate / 1e12:.0f} TFLOP/s; x: times dense")
    columns = ("decode_1", "decode_4", "decode_16", "prefill")
    parts = [part for part in columns if any(part in row for row in found)]
    print(f"{'':34}{'GB':>7} " + " ".join(f"{part.replace('decode_', 'batch '):>24}" for part in parts))
    for row in found:
        cells = []
        for part in parts:
            if part not in row:
                cells.append(f"{'':24}")
                continue
            ratio = row[part]["tokens_s"] / dense[part]["tokens_s"] if part in dense else float("nan")
            slower = " SLOWER" if ratio < 1 else ""
            cells.append(f"{row[part]['tokens_s']:9.0f}/s {ratio:5.2f}x {row[part]['of_floor']:5.0%}{slower}")
        print(f"{row['row']:34}{row['stored_gb']:7.2f} {' '.join(f'{cell:>24}' for cell in cells)}")
    failed = [row["row"] for row in bench.facts["rows"] if "error" in row]
    print(f"failed: {failed or 'none'}; no time for: {bench.facts['skipped'] or 'none'}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--layers", type=int, help="decoder layers (default: 32)")
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these (ceilings always)")
    parser.add_argument(
        "--candidates",
        nargs="*",
        choices=CANDIDATES,
        help="prefill of pivots, and codes, instead (none named: all)",
    )
    parser.add_argument("--quick", action="store_true")
    parsed = parser.parse_args()
    parsed.command = f"python benchmarks/decode.py --seconds {parsed.seconds:g}{' --quick' if parsed.quick else ''}"
    parsed.command += f" --only {' '.join(map(repr, parsed.only))}" if parsed.only else ""
    if parsed.candidates is None:
        main(Bench(parsed))
    else:
        parsed.command += " ".join([" --candidates", *parsed.candidates])
        candidates(Bench(parsed), parsed.candidates or list(CANDIDATES))
