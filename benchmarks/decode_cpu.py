"""Decoding on the CPU: a dense model and low-rank ones of the same shape, on one thread and on two.

    python benchmarks/decode_cpu.py ../shared/models/ref-llama-24m --out results/decode-cpu.json

The compressed models are made by the format's own code with one share of numbers kept in every decoder linear and
random weights: speed does not depend on them. Greedy decoding at batch 1 over transformers' static cache, eagerly and
with torch.compile. Models take turns, so that what else runs on the machine slows all of them alike; the best of the
rounds is reported, and their median. Beside it stand the seconds of a token that go into the decoder's linear layers
(one after the other, weights from memory as in use) and into the head: with linears that took exactly `keep` of their
time the whole would be `at most` so many times as fast, whatever their form.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import entry_for, fill_codes
from transformers import AutoModelForCausalLM, StaticCache

from spectrim.integrations.transformers import SpectrimConfig, install_modules
from spectrim.models.walk import find_layers

LENGTH, PROMPT = 128, 16


def compressed(dense: Any, keep: float, storage: str, multiple: int) -> Any:
    """A copy of the model with its decoder linears in `storage`, random."""
    model = copy.deepcopy(dense)
    layers = find_layers(model).layers
    entries = {la.name: entry_for(la.outputs, la.inputs, keep, storage, multiple) for la in layers}
    install_modules(model, SpectrimConfig(modules=entries))
    with torch.no_grad():
        for la in layers:
            module = model.get_submodule(la.name)
            for name, parameter in module.named_parameters():
                parameter.normal_(0, 1e-3 if name.endswith("scales") else parameter.shape[-1] ** -0.5)
            for part in module.modules():
                fill_codes(part)
    return model.eval()


class Decoder:
    """A model, its cache and the time of single tokens."""

    def __init__(self, model: Any, *, compiled: bool, processor: bool) -> None:
        self.model, self.processor = model, processor
        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        self.call = torch.compile(model.forward, dynamic=False) if compiled else model.forward
        self.took: list[float] = []
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        self.cache.reset()
        ids = torch.arange(PROMPT)[None]
        out = self.model(ids, past_key_values=self.cache, use_cache=True)
        self.next, self.at = out.logits[:, -1:].argmax(-1), PROMPT

    @torch.no_grad()
    def token(self) -> float:
        """Seconds of one more token."""
        if self.at >= LENGTH - 1:
            self.restart()
        clock = time.process_time if self.processor else time.perf_counter
        start = clock()
        out = self.call(self.next, past_key_values=self.cache, use_cache=True,
                        position_ids=torch.tensor([[self.at]]))  # fmt: skip
        self.next = out.logits[:, -1:].argmax(-1)
        self.at += 1
        return clock() - start


def parts(model: Any, clock: Callable[[], float]) -> dict[str, float]:
    """Least seconds of all linears of the decoder, and of the head, of one token."""
    layers = [model.get_submodule(layer.name) for layer in find_layers(model).layers]
    dtype = model.lm_head.weight.dtype
    inputs = {layer.in_features: torch.randn(1, 1, layer.in_features, dtype=dtype) for layer in layers}
    hidden = torch.randn(1, 1, model.lm_head.in_features, dtype=dtype)

    def seconds(run: Callable[[], Any]) -> float:
        start = clock()
        run()
        return clock() - start

    with torch.no_grad():
        return {
            "linears_s": min(
                seconds(lambda: [layer(inputs[layer.in_features]) for layer in layers]) for _ in range(12)
            ),
            "head_s": min(seconds(lambda: model.lm_head(hidden)) for _ in range(12)),
        }


def main(arguments: argparse.Namespace) -> None:
    """All models at each number of threads, eagerly and compiled."""
    dtype = getattr(torch, arguments.dtype)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    models = {"dense": dense}
    for keep in arguments.keep:
        for storage in arguments.storage:
            models[f"{storage} {keep:g}"] = compressed(dense, keep, storage, arguments.multiple)
    facts: dict[str, Any] = {"command": arguments.command, "dtype": arguments.dtype, "torch": torch.__version__,
                             "cpu": processor(), "load_before": os.getloadavg()[0], "rows": []}  # fmt: skip
    for compiled in (False, True) if arguments.compile else (False,):
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            decoders = {
                name: Decoder(model, compiled=compiled, processor=arguments.processor_time)
                for name, model in models.items()
            }
            for decoder in decoders.values():
                decoder.token()
                decoder.token()
            for _ in range(arguments.rounds):
                for decoder in decoders.values():
                    decoder.took.append(sum(decoder.token() for _ in range(arguments.tokens)) / arguments.tokens)
            base = min(decoders["dense"].took)
            clock = time.process_time if arguments.processor_time else time.perf_counter
            shares = {name: parts(model, clock) for name, model in models.items()}
            for name, decoder in decoders.items():
                best, middle = min(decoder.took), statistics.median(decoder.took)
                row = {"model": name, "threads": threads, "compiled": compiled, "tokens_s": 1 / best,
                       "median_tokens_s": 1 / middle, "times_dense": base / best,
                       "median_times_dense": statistics.median(decoders["dense"].took) / middle,
                       "bytes": sum(t.nbytes for t in models[name].state_dict().values()), **shares[name]}  # fmt: skip
                kept = 1.0 if name == "dense" else float(name.split()[1])
                row["at_most"] = base / (base - (1 - kept) * shares["dense"]["linears_s"])
                facts["rows"].append(row)
                print(f"{name:14} threads {threads} {'compiled' if compiled else 'eager':8} {row['tokens_s']:8.1f}/s "
                      f"{row['times_dense']:5.2f}x   median {row['median_tokens_s']:8.1f}/s "
                      f"{row['median_times_dense']:5.2f}x   linears {1e3 * row['linears_s']:.2f} head "
                      f"{1e3 * row['head_s']:.2f} of {1e3 * best:.2f} ms, at most {row['at_most']:.2f}x",
                      flush=True)  # fmt: skip
            facts["load_after"] = os.getloadavg()[0]
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


def processor() -> str:
    """As the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--storage", nargs="+", default=["factor", "pivot"])
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine; right for one thread only")
    parsed = parser.parse_args()
    parsed.command = f"python benchmarks/decode_cpu.py {parsed.model.name} --dtype {parsed.dtype}" + (
        " --compile" if parsed.compile else ""
    )
    parsed.command += " --processor-time" if parsed.processor_time else ""
    main(parsed)
