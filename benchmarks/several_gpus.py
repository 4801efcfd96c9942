"""What several GPUs of one host gain: seconds, ratio, memory and agreement with one, on random weights.

    python benchmarks/several_gpus.py --out results/several-gpus.json                          1 and 2 GPUs of this host
    python benchmarks/several_gpus.py --what blocks --out results/several-blocks.json
    python benchmarks/several_gpus.py --quick --out results/several-quick.json                 tiny, on a CPU, by gloo

    closed-form   calibration and decomposition of 4 blocks of 7B width, by 1 process and by 2
    train-13b     steps of score training of a 13B model, all blocks, whose weights and components 2 processes share out
    blocks        the way of large models (measured block by block, scores learned on shared-out weights) on 2 blocks of
                  7B width, by 1 process and by 2: figures of the two results beside each other

Weights are products whose spectra fall like 1/sqrt(i), made on the GPU. Every count of processes is a torchrun of its
own with the same seeds. A row is written as soon as it is there; one that fails says its error, and the next begins.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from scale_models import MATRIX_RATE, Shape, forward_operations
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from spectrim.engines import recompute, way
from spectrim.engines.layerwise import decompose_all
from spectrim.engines.learned import train_scores
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import plan_ranks
from spectrim.engines.sharded import TRAIN_SHARE, is_sharded, training_bytes
from spectrim.engines.shelf import energies_in
from spectrim.engines.spread import energies_of_all, hand_round, owners_of
from spectrim.evaluate.language import evaluate
from spectrim.linalg.factor import Spectrum
from spectrim.memory import Batch, release
from spectrim.method import LearnedMethod
from spectrim.models.load import pick_device
from spectrim.models.walk import Layer, Walk, find_layers, weight_of
from spectrim.processes import joined, present
from spectrim.registry import make_method

Row = dict[str, Any]
WHAT = ("closed-form", "train-13b", "blocks")
WORLDS = {"closed-form": [1, 2], "train-13b": [2], "blocks": [1, 2]}
SHAPES = {"closed-form": Shape(depth=4), "train-13b": Shape(5120, 13824, 40), "blocks": Shape(depth=2)}
QUICK = Shape(128, 320, 3, 256)
SHARE = {"closed-form": 0.5, "train-13b": 0.75, "blocks": 1.0}
"""Of the time that is left, what a part may take with all of its rows where others follow."""


SHOWN = (
    *("faster", "figure", "figure_differs", "peak_gb", "held_by_one_gb", "sharded_by_itself", "steps", "of_floor"),
    *("kl", "losses"),
)


def main() -> None:
    """Start torchrun for each row, or do the work of one of its processes."""
    options = parse()
    if "RANK" in os.environ:
        work(options)
        return
    rows: list[Row] = []
    end = time.monotonic() + options.seconds
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for what in options.what:
        left = SHARE[what] if what != options.what[-1] else 1.0
        worlds = options.worlds or WORLDS[what]
        stage_end = time.monotonic() + left * (end - time.monotonic())
        for world in worlds:
            rows.append(run_row(what, world, stage_end - time.monotonic(), options.out))
            options.out.write_text(json.dumps({"options": facts(options), "rows": beside_one(rows)}, indent=1) + "\n")
    show(beside_one(rows))


def parse() -> argparse.Namespace:
    """Options, the same for the launcher and the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=[*WHAT[:2]], choices=WHAT)
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--worlds", type=int, nargs="+", help="counts of processes, instead of those of each part")
    parser.add_argument("--blocks", type=int, help="instead of the blocks of each part")
    parser.add_argument("--steps", type=int, default=5, help="of training; the first is not counted")
    parser.add_argument("--seconds", type=float, default=190, help="for all of it; a row that takes longer is stopped")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def facts(options: argparse.Namespace) -> Row:
    """JSON-ready."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {**given, "torch": torch.__version__}


def run_row(what: str, world: int, seconds: float, out: Path) -> Row:
    """What rank 0 wrote, or the error."""
    row: Row = {"what": what, "processes": world}
    if seconds < 5:
        return {**row, "error": "no time left"}
    row_file = out.with_suffix(f".{what}.{world}.row.json")
    row_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [__file__, *sys.argv[1:]]
    # Multicast over NVLink is not allowed in every container, and NCCL then stops instead of doing without.
    environment = {"OMP_NUM_THREADS": "4", **os.environ, "NCCL_NVLS_ENABLE": "0", "ROW": str(row_file), "WHAT": what}
    began, error = time.monotonic(), ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            _, said = run.communicate(timeout=seconds)
            error = (
                "" if run.returncode == 0 else said[max(said.find("Traceback"), 0) :][:3000]
            )  # before the launcher's own
        except subprocess.TimeoutExpired:
            run.terminate()  # torchrun then stops its processes
            _, said = run.communicate()
            error = f"stopped after {seconds:.0f} s"
    found = json.loads(row_file.read_text()) if row_file.exists() else {}
    row_file.unlink(missing_ok=True)
    row |= {"wall_s": time.monotonic() - began, **found, **({"error": error} if error else {})}
    print(json.dumps(row), flush=True)
    return row


class Told:
    """The row of this process, written by the first after every stage."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.row = device, {"seconds": {}, "device": device_name(device)}

    def timed(self, stage: str, done: Callable[[], Any]) -> Any:
        """Do it, all ranks together, and note seconds and memory."""
        self.finish()
        start = time.perf_counter()
        result = done()
        self.finish()
        self.row["seconds"][stage] = time.perf_counter() - start
        self.row["peak_gb"] = [round(x, 2) for x in present().objects(peak_gb(self.device))]
        self.write()
        return result

    def finish(self) -> None:
        """All ranks, and all that they have begun."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        present().wait()

    def write(self, **more: Any) -> None:
        """Put it down."""
        self.row |= more
        if present().is_first:
            new = Path(os.environ["ROW"] + ".new")
            new.write_text(json.dumps(self.row))
            new.replace(os.environ["ROW"])


def work(options: argparse.Namespace) -> None:
    """One process's part of a row."""
    what, name = os.environ["WHAT"], "cpu" if options.quick else "auto"
    with joined(name):
        device = pick_device(name)
        shape = QUICK if options.quick else SHAPES[what]
        if options.blocks:
            shape = shape._replace(depth=options.blocks)
        warm_up(device)
        {"closed-form": closed_form, "train-13b": train, "blocks": by_blocks}[what](
            options, shape, device, Told(device)
        )


def warm_up(device: torch.device) -> None:
    """Libraries, communicators and workspaces are set up before any clock runs."""
    small = torch.randn(256, 256, device=device, dtype=torch.float64)
    torch.linalg.eigh(small @ small.mT)
    torch.linalg.svd(small)
    torch.linalg.cholesky(small @ small.mT + 256 * torch.eye(256, device=device, dtype=torch.float64))
    present().sum_everywhere(small)


def closed_form(options: argparse.Namespace, shape: Shape, device: torch.device, told: Told) -> None:
    """Statistics, spectra, ranks: what all layers at once take."""
    model = random_model(shape, device, torch.float32)
    walk, method = find_layers(model), make_method("two-sided")
    ids = tokens(*((16, 32) if options.quick else (256, 1024)), shape.vocabulary)
    needs, batch = method.needs, Batch(4 if options.quick else 16)
    with torch.random.fork_rng(devices=[]):
        measure(model, walk, ids[: 2 * present().world, :64], needs, batch_size=1, owned=True)

    def calibrate() -> Any:
        return batch.run("calibrate", lambda size: measure(model, walk, ids, needs, batch_size=size, owned=True))

    stats = told.timed("calibrate", calibrate)
    spectra = told.timed("decompose", lambda: decompose_all(method, model, walk, stats))  # type: ignore[arg-type]  by layers
    energies = energies_of_all(model, walk, energies_in(spectra))
    plan = plan_ranks(method, walk, energies, 0.5)  # type: ignore[arg-type]  by layers
    own = list(spectra)
    told.row |= {
        "layers": present().objects(len(own)),
        "figure": float(sum(e.double().sum() for e in energies.values())),
    }
    told.timed("hand round", lambda: hand_round(model, walk, spectra, {}, own, plan))
    told.write(perplexity=told.timed("evaluate", lambda: evaluate(model, ids[:32])).perplexity)


def by_blocks(options: argparse.Namespace, shape: Shape, device: torch.device, told: Told) -> None:
    """`soco` with a few steps of learned scores as where nothing fits; the figure is the perplexity after it."""
    for module in (way, recompute):
        module.fits_whole = lambda *_: False  # type: ignore[assignment]
    model = random_model(shape, device, torch.bfloat16)
    ids = tokens(*((16, 32) if options.quick else (32, 1024)), shape.vocabulary)
    options_ = {"coupling": "none", "steps": options.steps, "batch_size": 4, "project_every": 2, "newton": 1}
    sharded = None if present().alone else True
    made = told.timed("compress", lambda: compress_model(
        model, make_method("soco", None, options_), 0.6, ids, gradient_windows=16, shard_weights=sharded
    ))  # fmt: skip
    told.row["stages"] = {stage: round(seconds, 2) for stage, seconds in made.seconds.items()}
    found = told.timed("evaluate", lambda: evaluate(made.model, ids[:16], dense=model))
    told.write(figure=found.perplexity, kl=found.kl, losses=list(made.learned.losses) if made.learned else [])


def train(options: argparse.Namespace, shape: Shape, device: torch.device, told: Told) -> None:
    """Steps of learned scores; of what is frozen each process holds its part."""
    sharded = not present().alone
    model = told.timed("make", lambda: random_model(shape, device, torch.bfloat16))
    walk = find_layers(model)
    rows, length = (4, 32) if options.quick else (8, 2048)
    method = make_method("soco", None, {"steps": options.steps, "batch_size": rows, "project_every": 2})
    assert isinstance(method, LearnedMethod)
    told.write(
        held_by_one_gb=training_bytes(walk, 2) / 1e9, sharded_by_itself=is_sharded(model, walk, method, None),
        sharded_above_share=TRAIN_SHARE, blocks=shape.depth, tokens_a_step=rows * length,
    )  # fmt: skip
    spectra = Made(walk, device)
    plan = plan_ranks(method, walk, energies_of_all(model, walk, spectra.energies()), 0.8)
    ends: list[float] = []

    def note(_stage: str, done: int, _total: int) -> None:
        told.finish()
        ends.append(time.perf_counter())
        if done > 1:
            told.row["seconds"]["step"] = (ends[-1] - ends[0]) / (len(ends) - 1)
        told.write(steps=done, peak_gb=[round(x, 2) for x in present().objects(peak_gb(device))])

    release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = tokens(rows * 2, length, shape.vocabulary)
    learned = told.timed("train", lambda: train_scores(
        method, model, walk, spectra, 0.8, ids, plan=plan, progress=note, sharded=sharded
    ))  # fmt: skip
    told.write(losses=list(learned.losses), figure=learned.losses[-1])
    if "step" in told.row["seconds"] and not options.quick:
        work = 5 * forward_operations(model, rows * length, length) / present().world
        work += 3 * sum(2.0 * la.outputs * la.inputs * min(la.outputs, la.inputs) for la in walk.layers)
        told.write(of_floor=work / MATRIX_RATE / told.row["seconds"]["step"])


class Made(Mapping[str, Spectrum]):
    """The components of the layers that this rank owns, made anew whenever they are asked for: nothing is stored."""

    def __init__(self, walk: Walk, device: torch.device) -> None:
        owners = owners_of(walk, frozenset())
        self.device = device
        self.layers = {la.name: (i, la) for i, la in enumerate(walk.layers) if owners[la.name] == present().rank}

    def __getitem__(self, name: str) -> Spectrum:
        number, layer = self.layers[name]
        left, right = components(layer, number, self.device)
        return Spectrum(left, right, self.energy(layer))

    def energy(self, layer: Layer) -> Tensor:
        """(K,), in the mean over random numbers."""
        falls = 1 / torch.arange(1, min(layer.outputs, layer.inputs) + 1, device=self.device, dtype=torch.float64)
        return falls / falls.sum() * (0.02**2 * layer.outputs * layer.inputs)

    def energies(self) -> dict[str, Tensor]:
        """Of the layers of this rank."""
        return {name: self.energy(layer) for name, (_, layer) in self.layers.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def components(layer: Layer, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors (O, K) and (K, I), float32, of the weight of layer `number`, whose entries are about 0.02."""
    generator = torch.Generator(device=device).manual_seed(number)
    rank = min(layer.outputs, layer.inputs)
    falls = torch.arange(1, rank + 1, device=device).float().rsqrt()
    left = torch.randn(layer.outputs, rank, generator=generator, device=device) * falls
    right = torch.randn(rank, layer.inputs, generator=generator, device=device)
    return left * (0.02 / falls.norm()), right


@torch.no_grad()
def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama whose linear weights are the products of `components`."""
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        max_position_embeddings=4096, dtype=dtype, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(1)
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02, generator=generator)
    for number, layer in enumerate(find_layers(model).layers):
        left, right = components(layer, number, device)
        weight_of(model.get_submodule(layer.name)).copy_(left @ right)
    return model.eval()


def tokens(count: int, length: int, vocabulary: int) -> Tensor:
    """Random windows (count, length)."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(2))


def device_name(device: torch.device) -> str:
    """What it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_gb(device: torch.device) -> float:
    """Largest memory of the GPU so far, in 1e9 bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def beside_one(rows: list[Row]) -> list[Row]:
    """Every row beside the one of one process, where there is one."""
    for row in rows:
        one = next((r for r in rows if r["what"] == row["what"] and r["processes"] == 1 and "seconds" in r), None)
        if one is None or "seconds" not in row:
            continue
        known = one["seconds"]
        row["faster"] = {k: round(known[k] / s, 2) for k, s in row["seconds"].items() if k in known}
        parts = [k for k in ("calibrate", "decompose") if k in known and k in row["seconds"]]
        if len(parts) == 2:
            both = [sum(r["seconds"][k] for k in parts) for r in (one, row)]
            row["faster"]["calibrate + decompose"] = round(both[0] / both[1], 2)
        if "figure" in one and "figure" in row:
            row["figure_differs"] = abs(row["figure"] / one["figure"] - 1)
    return rows


def show(rows: list[Row]) -> None:
    """A short table."""
    for row in rows:
        seconds = ", ".join(f"{stage} {s:.2f} s" for stage, s in row.get("seconds", {}).items())
        print(f"{row['what']}, {row['processes']} processes: {seconds}")
        more = {name: row[name] for name in SHOWN if row.get(name) is not None}
        texts = (f"{k} {v:.4g}" if isinstance(v, float) and math.isfinite(v) else f"{k} {v}" for k, v in more.items())
        print("   ", ", ".join(texts))
        if "error" in row:
            print(f"    error: {row['error'][-1500:]}")


if __name__ == "__main__":
    main()
