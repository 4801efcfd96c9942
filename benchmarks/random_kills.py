"""Kills runs at random moments until a number of kills is reached; every result must have the bytes of a clean run.

    python benchmarks/random_kills.py --kills 200 --seed 0 --out benchmarks/results/random_kills.json

Each child is a fork that runs the command line on a tiny random model and gets SIGKILL after a time drawn uniformly
from [0, 1.1 x a whole run]. A run that was killed is given the same command again, and may be killed again where it
went on. After every kill: the target is absent, the old model, or complete (all checksums of its manifest), and the
source is untouched. After every run that ended: the result has the bytes of an undisturbed one. The check in a fresh
process is left out: it takes longer than all the rest and writes nothing.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spectrim
from spectrim import any_size_job, cli, job
from spectrim.store.manifest import verify_manifest

TINY = Path(spectrim.__file__).parent / "assets" / "tiny"
COMMON = ("--eval", "none", "--calib-windows", "8", "--calib-length", "16", "--gradient-windows", "8")
RUNS: dict[str, tuple[str, ...]] = {
    "closed form": ("--method", "two-sided", "--keep", "0.8"),
    "fast": ("--method", "soco", "--preset", "fast", "--keep", "0.7"),
    "learned": (
        *("--method", "soco", "--keep", "0.8", "--train-windows", "8", "--set", "steps=6", "--set", "distil_steps=4"),
        *("--set", "batch_size=2", "--set", "project_every=2"),
    ),
    "any size": (
        *("--any-size", "--method", "soco", "--anchors", "0.8,0.6", "--any-size-steps", "6"),
        *("--set", "batch_size=2", "--train-windows", "8"),
    ),
    "overwrite": ("--method", "svd-llm", "--keep", "0.8", "--recover", "block:2", "--overwrite"),
}
TOLD = {"report.json", "report.html", "manifest.json"}
"""Seconds, memory, and what was gone on from differ between two runs; the manifest has the report's checksum."""


def tiny_model(folder: Path) -> Path:
    """A random Llama of two blocks with the tokenizer of builtin:tiny."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file that does not tell of the run itself."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in TOLD)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start(words: list[str]) -> int:
    """`spectrim WORDS` in a fork; its process id."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.argv = ["spectrim", *words]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """Exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fill_old(out: Path) -> None:
    """What `--overwrite` replaces."""
    out.mkdir()
    (out / "config.json").write_text('{"old": true}')


def check_target(out: Path, *, old: bool) -> str:
    """What is there after a kill; raises if it is neither nothing, nor the old, nor complete."""
    if not out.exists():
        if old:
            raise AssertionError(f"{out}: neither the old result nor the new one is there")
        return "absent"
    if old and (out / "config.json").read_text() == '{"old": true}':
        return "old"
    verify_manifest(out)
    return "new"


def torture(name: str, words: list[str], where: Path, kills: int, rng: np.random.Generator) -> dict[str, object]:
    """Kill runs of one command until there were `kills`; returns what happened."""
    old = "--overwrite" in words
    whole, out = where / "whole", where / "out"
    began = time.monotonic()
    if wait(start([*words, "--out", str(whole)])) != 0:
        raise AssertionError(f"{name}: the undisturbed run failed")
    lasts_s = time.monotonic() - began
    expected = hashes(whole)
    done, results, in_a_row = 0, 0, 0
    seen, longest, tallies = Counter(), 0, Counter()
    while done < kills or in_a_row:
        if old and not out.exists():
            fill_old(out)
        process = start([*words, "--out", str(out)])
        if done < kills:
            time.sleep(rng.uniform(0, 1.1 * lasts_s))
            os.kill(process, signal.SIGKILL)
        code = wait(process)
        if code == -signal.SIGKILL:
            done, in_a_row = done + 1, in_a_row + 1
            longest = max(longest, in_a_row)
            seen[check_target(out, old=old)] += 1
            tallies["with state to go on from"] += any((where / "out.resume").glob("*.safetensors"))
            tallies["with a partial result"] += any(where.glob("out.partial-*"))
            if seen["new"] and check_target(out, old=old) == "new":  # killed between publishing and the end
                if wait(start([*words, "--out", str(out), *([] if old else ["--overwrite"])])) != 0:
                    raise AssertionError(f"{name}: the run after a published one failed")
                code = 0
            else:
                continue
        if code != 0:
            raise AssertionError(f"{name}: exit code {code} after {done} kills")
        if hashes(out) != expected:
            found = hashes(out)
            other = [file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file)]
            kept = shutil.copytree(where, tempfile.mkdtemp(), dirs_exist_ok=True)
            raise AssertionError(f"{name}: {other} differ after {in_a_row} kills in a row; see {kept}")
        if (where / "out.resume").exists():
            raise AssertionError(f"{name}: a finished run left {where / 'out.resume'}")
        results, in_a_row = results + 1, 0
        shutil.rmtree(out)
    for left in where.glob("out.partial-*"):
        shutil.rmtree(left)
    return {
        "kills": done, "results": results, "identical": results, "run_s": round(lasts_s, 2), "most_in_a_row": longest,
        "target_after_a_kill": dict(seen), **dict(tallies),
    }  # fmt: skip


def main(kills: int, seed: int, out: Path | None, only: str | None, say: Callable[..., None] = print) -> None:
    """All runs, an equal number of kills for each."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    chosen = {name: words for name, words in RUNS.items() if only in (None, name)}
    table: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(job, "reload_difference", return_value=0.0):
        source, text = tiny_model(Path(scratch) / "model"), Path(scratch) / "text.txt"
        text.write_text(Path(json.__file__).read_text())
        before = hashes(source)
        with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
            for number, (name, words) in enumerate(chosen.items()):
                where = Path(scratch) / str(number)
                where.mkdir()
                share = kills // len(chosen) + (number < kills % len(chosen))
                line = ["compress", str(source), "--calib", str(text), *COMMON, "--save-every", "0", *words]
                table[name] = torture(name, line, where, share, rng)
                say(name, table[name], flush=True)
        if hashes(source) != before:
            raise AssertionError("the source was changed")
    facts = {"command": f"python benchmarks/random_kills.py --kills {kills} --seed {seed}", "runs": table}
    facts |= {"spectrim": spectrim.__version__, "torch": torch.__version__, "system": platform.platform()}
    if out is not None:
        out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RUNS, help="one kind of run")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    arguments = parser.parse_args()
    main(arguments.kills, arguments.seed, arguments.out, arguments.only)
