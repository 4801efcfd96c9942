"""`--low-memory` on a model in files: seconds of each stage, memory of the GPU and of the process, scratch files.

Host memory is counted as RssAnon + RssShmem of /proc/self/status, sampled every 20 ms: what the process itself holds
(pinned pieces included). Pages of files, which VmHWM counts too, are the kernel's to give up; VmHWM is told beside it.
`before` is what Python, torch and the GPU's libraries hold before the run begins.
"""

import json
import random
import shutil
import string
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from scale_models import Shape, falling
from transformers import LlamaConfig

import spectrim
from spectrim.engines.plan_costs import distinct_inputs
from spectrim.job import Request, run
from spectrim.models.load import meta_model, resolve
from spectrim.models.walk import find_layers
from spectrim.store.pieces import MOVED, Pieces
from spectrim.store.shards import Shards

Row = dict[str, Any]
ALLOWED = {"seconds": 720, "gpu_reserved_gb": 24}
TOKENIZER = Path(spectrim.__file__).parent / "assets" / "tiny"
QUICK_SHAPE = Shape(128, 352, 3, 8192)
"""For a CPU; the vocabulary is that of the tokenizer."""
DONE = "written.json"
PEAKS = ("gpu_gb", "gpu_reserved_gb", "host_own_gb")


def status_bytes(*fields: str) -> int:
    """The sum of some fields of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[field].split()[0]) * 1024 for field in fields if field in lines)


class StageTable:
    """Seconds, peaks and bytes through files of each stage, as progress tells; in a file after every line of it.

    Time belongs to the stage that tells that something is done, or, if it only begins, to the one before. torch's peaks
    are counted anew at each line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, "files"
        self.rows: list[Row] = []
        self._mark()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Progress of the run."""
        if stage != self.name and done:
            self.name = str(stage)
        self.note(f"{done}/{total}", show=done == total or stage != self.name)
        self.name = str(stage)

    def note(self, at: str = "", *, show: bool = True) -> None:
        """What was since the last line belongs to the present stage."""
        now = {"seconds": time.perf_counter() - self.since[0], "read_gb": (MOVED.read - self.since[1]) / 1e9,
               "written_gb": (MOVED.written - self.since[2]) / 1e9}  # fmt: skip
        if not self.rows or self.rows[-1]["stage"] != self.name:
            self.rows.append({"stage": self.name} | dict.fromkeys([*now, *PEAKS], 0.0))
        row = self.rows[-1]
        row |= {key: row[key] + value for key, value in now.items()} | {"at": at}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            row["gpu_gb"] = max(row["gpu_gb"], torch.cuda.max_memory_allocated() / 1e9)
            row["gpu_reserved_gb"] = max(row["gpu_reserved_gb"], torch.cuda.max_memory_reserved() / 1e9)
        row["host_own_gb"] = max(row["host_own_gb"], status_bytes("RssAnon", "RssShmem") / 1e9)
        self._mark()
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.rows, indent=1))
        new.replace(self.path)
        if show:
            said = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ]
            print("   ", ", ".join(said), flush=True)

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.since = time.perf_counter(), MOVED.read, MOVED.written

    def most(self, key: str) -> float:
        """Of all stages."""
        return max((row[key] for row in self.rows), default=0.0)

    def table(self) -> str:
        """One line a stage."""
        keys = ["seconds", "read_gb", "written_gb", *PEAKS]
        lines = [f"{'stage':12}" + "".join(f"{key:>16}" for key in keys)]
        lines += [f"{row['stage']:12}" + "".join(f"{row[key]:16.2f}" for key in keys) for row in self.rows]
        return "\n".join(lines)


@contextmanager
def host_watched() -> Iterator[dict[str, int]]:
    """The most that the process itself held while this was open, under `most`."""
    seen, stop = {"most": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            seen["most"] = max(seen["most"], status_bytes("RssAnon", "RssShmem"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def write_model(folder: Path, shape: Shape, device: torch.device, shard: str) -> Row:
    """A Llama of this shape in bf16, its weights random with falling spectra, in shards; once."""
    facts = {"shape": list(shape), "shard": shard}
    if (folder / DONE).exists() and json.loads((folder / DONE).read_text()) == facts:
        return {"reused": str(folder)}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        max_position_embeddings=4096, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tensors = meta_model(config).state_dict()
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    files = {folder / name: {n: tensors[n] for n in names} for name, names in split.filename_to_tensors.items()}
    shards = Shards(files, Pieces(device))
    generator = torch.Generator(device=device).manual_seed(0)
    for name, like in tensors.items():
        if like.ndim == 1:
            made = torch.ones(like.shape, device=device)
        elif "embed" in name:
            made = torch.randn(like.shape, generator=generator, device=device) * 0.02
        else:
            made = falling(*like.shape, generator)
        shards.put(name, made.bfloat16())
    shards.finish()
    (folder / DONE).write_text(json.dumps(facts))
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def write_text(path: Path, characters: int, seed: int) -> Path:
    """Random words, a paragraph each 120 of them."""
    if not path.exists():
        rng = random.Random(seed)
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(20_000)]
        lines, written = [], 0
        while written < characters:
            lines.append(" ".join(rng.choices(words, k=120)))
            written += len(lines[-1])
        path.write_text("\n\n".join(lines))
    return path


def low_memory(
    work: Path,
    model: Path,
    shape: Shape,
    device: torch.device,
    count: int,
    length: int,
    shard: str,
    progress: StageTable,
) -> Row:
    """`spectrim compress FOLDER --preset fast --low-memory`, as the command runs it."""
    made = write_model(model, shape, device, shard)
    texts = [write_text(work / f"{name}.txt", size * length * 8 + 10_000, seed) for name, size, seed in
             (("calibration", count, 1), ("evaluation", 40, 2))]  # fmt: skip
    request = Request(
        model=str(model), keep=0.8, method="soco", preset="fast", calib=str(texts[0]), calib_windows=count,
        calib_length=length, eval=str(texts[1]), eval_windows=40, device=str(device), low_memory=True,
        quality_gate=0,
    )  # fmt: skip
    out = work / "small"
    shutil.rmtree(out, ignore_errors=True)
    torch.ones(1, device=device)
    progress.note()
    before = status_bytes("RssAnon", "RssShmem")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    started = time.perf_counter()
    with host_watched() as seen:
        result = run(request, out, progress=progress)
    took = time.perf_counter() - started
    progress.note("end")
    report = result.report
    stages = {k: round(v, 1) for k, v in report["seconds"].items()}
    walk = find_layers(meta_model(resolve(str(model)).config))
    grams = max(sum(n**2 for n in block) for block in distinct_inputs(walk))
    outputs = max(sum(la.outputs**2 for la in walk.layers if la.block == b) for b in range(len(walk.block_names)))
    largest = max(path.stat().st_size for path in model.glob("*.safetensors"))
    row = {
        "seconds": took,
        "stages": stages,
        "outside_of_stages_s": took - sum(v for k, v in report["seconds"].items() if k != "total"),
        "gpu_gb": progress.most("gpu_gb"),
        "gpu_reserved_gb": progress.most("gpu_reserved_gb"),
        "host_own_gb": seen["most"] / 1e9,
        "host_before_gb": before / 1e9,
        "host_hwm_gb": status_bytes("VmHWM") / 1e9,
        "host_allowed_gb": (largest + 4 * (grams + outputs)) / 1e9,
        "scratch_gb": report["low_memory"]["scratch_most_bytes"] / 1e9,
        "read_gb": report["low_memory"]["read_bytes"] / 1e9,
        "written_gb": report["low_memory"]["written_bytes"] / 1e9,
        "fallbacks": report["fallbacks"],
        "model_gb": sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9,
        "result_gb": report["stored"]["model_bytes"] / 1e9,
        "keep": report["stored"]["keep"],
        "windows": report["text"]["calibration"]["windows"],
        "gradient_windows": report["gradient_windows"],
        "perplexity": [report["quality"][key]["perplexity"] for key in ("dense", "compressed")],
        "kl": report["quality"]["compressed"]["kl"],
        "model_written": made,
        "warnings": report["warnings"],
        "stages_table": progress.rows,
    }  # fmt: skip
    shutil.rmtree(out)
    return row
