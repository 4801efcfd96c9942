"""Calibration and decomposition of a model of 7B width by one GPU and by several: seconds, ratio, memory, agreement.

    python benchmarks/several_gpus.py --out results/several-gpus.json                  1 and 2 GPUs of this host
    python benchmarks/several_gpus.py --quick --out /tmp/several.json                  the same on a CPU, tiny, by gloo

Weights and tokens are random; weights are products whose spectra fall like 1/sqrt(i). Every count of processes is a
torchrun of its own with the same seeds: statistics and energies are compared with those of one process. A row is
written as soon as it is there; one that fails says its error, and the next begins.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectrim.engines.layerwise import decompose_all
from spectrim.engines.measure import measure
from spectrim.engines.ranks import plan_ranks
from spectrim.engines.spread import energies_of_all, hand_round
from spectrim.evaluate.language import evaluate
from spectrim.memory import Batch
from spectrim.models.load import pick_device
from spectrim.models.walk import find_layers, weight_of
from spectrim.processes import joined, present
from spectrim.registry import make_method

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "quick": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 256},
}


def main() -> None:
    """Start torchrun for each count of processes, or do the work of one of them."""
    options = parse()
    if "RANK" in os.environ:
        work(options)
        return
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for world in options.worlds:
        left = options.seconds - (time.monotonic() - began)
        rows.append(run_world(options, world, left))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"options": facts(options), "rows": with_ratios(rows)}, indent=1) + "\n")
    show(with_ratios(rows))


def parse() -> argparse.Namespace:
    """Options, the same for the launcher and the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="counts of processes")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--method", default="two-sided", help="layer method whose metric is measured and decomposed in")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.windows, options.length, options.batch = 2, 16, 32, 4
    return options


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """JSON-ready."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def run_world(options: argparse.Namespace, world: int, seconds: float) -> dict[str, Any]:
    """One row: what rank 0 wrote, or the error."""
    row_file = options.out.with_suffix(f".{world}.row.json")
    row_file.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)),
        *(__file__, *sys.argv[1:]),
    ]
    environment = {"OMP_NUM_THREADS": "4", **os.environ, "ROW": str(row_file)}
    try:
        done = subprocess.run(
            command, env=environment,
            capture_output=True, text=True, timeout=max(seconds, 1), check=False,
        )  # fmt: skip
        error = "" if done.returncode == 0 else (done.stderr or done.stdout)[-3000:]
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds:.0f} s"
    found = json.loads(row_file.read_text()) if row_file.exists() else {}
    row_file.unlink(missing_ok=True)
    return {"processes": world, **found, **({"error": error} if error else {})}


def work(options: argparse.Namespace) -> None:
    """One process's part; rank 0 writes the row after every stage."""
    row: dict[str, Any] = {"seconds": {}}
    name = "cpu" if options.quick else "auto"
    with joined(name):
        device = pick_device(name)
        model = decaying_model(options, device)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (options.windows, options.length), generator=generator)
        walk, method = find_layers(model), make_method(options.method)
        needs = method.needs
        with torch.random.fork_rng(devices=[]):  # kernels, communicators and workspaces are set up before the clock
            measure(model, walk, ids[: present().world, :64], needs, owned=True)
            present().sum_everywhere(torch.ones(8, device=device, dtype=torch.float64))

        def timed(stage: str, work: Any) -> Any:
            finish(device)
            start = time.perf_counter()
            result = work()
            finish(device)
            row["seconds"][stage] = time.perf_counter() - start
            row["peak_gib"] = [round(x, 2) for x in present().objects(peak_gib(device))]
            if present().is_first:
                Path(os.environ["ROW"]).write_text(json.dumps(row))
            return result

        batch = Batch(options.batch)
        stats = timed("calibrate", lambda: batch.run(
            "calibrate", lambda size: measure(model, walk, ids, needs, batch_size=size, owned=True)
        ))  # fmt: skip
        spectra = timed("decompose", lambda: decompose_all(method, model, walk, stats))  # type: ignore[arg-type]  by layers
        row["layers"] = present().objects(len(spectra))
        energies = energies_of_all(model, walk, spectra)
        row["energy"] = float(sum(e.double().sum() for e in energies.values()))
        plan = plan_ranks(method, walk, energies, 0.5)  # type: ignore[arg-type]  by layers
        own = list(spectra)
        timed("hand round", lambda: hand_round(model, walk, spectra, {}, own, plan))
        row["perplexity"] = timed("evaluate", lambda: evaluate(model, ids[:32])).perplexity
        row["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        if present().is_first:
            Path(os.environ["ROW"]).write_text(json.dumps(row))


@torch.no_grad()
def decaying_model(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A random Llama in float32 whose linear weights have singular values that fall like 1/sqrt(i)."""
    shape = SHAPES["quick" if options.quick else "7b"]
    config = LlamaConfig(
        **shape, num_hidden_layers=options.blocks, num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=options.length, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).float().eval()
    for layer in find_layers(model).layers:
        weight = weight_of(model.get_submodule(layer.name))
        k = min(weight.shape)
        falling = torch.arange(1, k + 1, device=device).float().rsqrt()
        left = torch.randn(weight.shape[0], k, device=device) * falling
        made = left @ torch.randn(k, weight.shape[1], device=device)
        weight.copy_(made / made.norm() * (weight.shape[0] ** 0.5))  # rows of size 1: activations keep their size
    return model


def finish(device: torch.device) -> None:
    """All ranks, and all that they have begun."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    present().wait()


def peak_gib(device: torch.device) -> float:
    """Largest memory of the GPU so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row beside the one of one process, where there is one."""
    one = next((r for r in rows if r["processes"] == 1 and "seconds" in r), None)
    for row in rows:
        if one is not None and "seconds" in row:
            known = one["seconds"]
            row["faster"] = {k: round(known[k] / s, 2) for k, s in row["seconds"].items() if k in known}
            both = [sum(r["seconds"].get(k, float("nan")) for k in ("calibrate", "decompose")) for r in (one, row)]
            row["faster"]["calibrate + decompose"] = round(both[0] / both[1], 2)
            if "energy" in one and "energy" in row:
                row["energy_differs"] = abs(row["energy"] / one["energy"] - 1)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A short table."""
    stages = ["calibrate", "decompose", "hand round", "evaluate"]
    head = " ".join(f"{stage + ' s':>13}" for stage in stages)
    print(f"{'processes':>9} {head} {'cal+dec x':>9} {'energy diff':>11}  GiB")
    for row in rows:
        seconds = " ".join(f"{row.get('seconds', {}).get(s, float('nan')):13.2f}" for s in stages)
        ratio = row.get("faster", {}).get("calibrate + decompose", float("nan"))
        print(f"{row['processes']:9} {seconds} {ratio:9.2f} {row.get('energy_differs', float('nan')):11.1e}  "
              f"{row.get('peak_gib', '')}")  # fmt: skip
        if "error" in row:
            print(f"          error: {row['error'][-1500:]}")


if __name__ == "__main__":
    main()
