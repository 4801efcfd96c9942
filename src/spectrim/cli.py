"""The command line. Thin: it parses, calls, prints. Results go to stdout, everything else to stderr."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.errors import UsageError
from spectrim.terminal import emit, exit_codes, print_table, progress_printer, stderr, stdout, stoppable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ModelArg = Annotated[str, typer.Argument(help="hub id, local folder, or builtin:tiny")]
Keep = Annotated[float, typer.Option(help="share of the decoder linears' stored numbers that remains, in (0, 1]")]
Method = Annotated[str, typer.Option(help="see `spectrim methods`")]
Preset = Annotated[str | None, typer.Option(help="fast, balanced or best, for methods that train")]
Set = Annotated[list[str], typer.Option("--set", help="NAME=VALUE, a field of the method; may be repeated")]
Recover = Annotated[
    list[str],
    typer.Option(help="step after the method: refit, block or kl, the last two also NAME:STEPS; may be repeated"),
]
Calib = Annotated[str, typer.Option(help="hub data set, .txt/.jsonl files, builtin:stdlib, or self")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]
Dtype = Annotated[
    str, typer.Option(help="dtype of the stored result: auto (as the source), float32, bfloat16, float16")
]
Tokenizer = Annotated[str | None, typer.Option(help="tokenizer folder, if the model has none")]
Seed = Annotated[int, typer.Option(help="seeds everything that is random", min=0)]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout, logs on stderr")]


def main() -> None:
    """Entry point: exit codes as in docs/errors.md, a traceback only with SPECTRIM_DEBUG=1."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with exit_codes(), stoppable():
        app()


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["rank=8", "basis=svd"]` to values: JSON where it parses (8, 0.5, true), else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair}: expected NAME=VALUE, e.g. --set steps=100")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[name.replace("-", "_")] = value
    return options


@app.command()
def compress(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    keep: Keep = 0.8,
    method: Method = "soco",
    preset: Preset = None,
    set_: Set = [],  # noqa: B006  typer reads the default, nobody changes it
    recover: Recover = [],  # noqa: B006
    calib: Calib = "builtin:stdlib",
    calib_windows: Annotated[int, typer.Option(help="windows that feed the statistics")] = 256,
    calib_length: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    gradient_windows: Annotated[
        int | None, typer.Option(help="windows that give gradients (default: all on a GPU, a quarter on a CPU)")
    ] = None,
    train_windows: Annotated[int, typer.Option(help="windows for learned steps, at most")] = 4096,
    eval_: Annotated[str, typer.Option("--eval", help="evaluation text, as for --calib, or none")] = "builtin:stdlib",
    eval_windows: Annotated[int, typer.Option(help="evaluation windows")] = 40,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT atomically")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard OUT.resume of a stopped run, start anew")] = False,
    save_every: Annotated[float, typer.Option(help="seconds between saved states of training", min=0)] = 60.0,
    json_: Json = False,
) -> None:
    """Compress a model and write a folder that plain transformers loads."""
    from spectrim.job import Request, run
    from spectrim.report.card import table

    request = Request(
        model=model, keep=keep, method=method, preset=preset, options=parse_options(set_), recover=tuple(recover),
        calib=calib, calib_windows=calib_windows, calib_length=calib_length, gradient_windows=gradient_windows,
        train_windows=train_windows, eval=eval_, eval_windows=eval_windows, tokenizer=tokenizer, device=device,
        dtype=dtype, seed=seed,
    )  # fmt: skip
    report = run(
        request, out, overwrite=overwrite, restart=restart, save_every_s=save_every, progress=progress_printer(json_)
    ).report

    def show() -> None:
        print_table(
            f"{model}, {report['method']['method']}, keep {report['stored']['keep']:.4f}",
            ["", "dense", "compressed"],
            [list(row) for row in table(report)],
        )
        for taken_up in report.get("resumed", []):
            stderr.print(f"resumed at step {taken_up['step']} of {taken_up['stage']}")
        for warning in report["warnings"]:
            stderr.print(f"warning: {warning}")
        stdout.print(f"\nwritten to {out} in {report['seconds']['total']:.0f} s. Load it with\n", soft_wrap=True)
        stdout.print(load_lines(out), soft_wrap=True)

    emit(report, json_, show)


def load_lines(folder: Path) -> str:
    """The three lines of Python that load a folder."""
    return (
        "    import spectrim\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    model = AutoModelForCausalLM.from_pretrained({json.dumps(str(folder))})\n"
    )


@app.command()
def plan(
    model: ModelArg,
    keep: Keep = 0.8,
    method: Method = "soco",
    preset: Preset = None,
    set_: Set = [],  # noqa: B006
    calib_windows: Annotated[int, typer.Option(help="windows that feed the statistics")] = 256,
    calib_length: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_: Json = False,
) -> None:
    """Say what `compress` would do, without touching a weight."""
    from spectrim.engines.plan import estimate
    from spectrim.job import Request, foresee
    from spectrim.models.load import pick_device, pick_dtype, resolve

    request = Request(
        model=model, keep=keep, method=method, preset=preset, options=parse_options(set_), device=device, dtype=dtype,
        calib_windows=calib_windows, calib_length=calib_length,
    )  # fmt: skip
    configured = request.check()
    source = resolve(model)
    foresee(request, configured, source)
    facts = estimate(
        source, configured, keep, windows=calib_windows, length=calib_length,
        dtype=pick_dtype(dtype, source.dtype), device=pick_device(device),
    )  # fmt: skip

    def show() -> None:
        rows = [
            [
                r["name"],
                "x".join(map(str, r["shape"])),
                r["codec"],
                str(r["rank"] or "by calibration"),
                f"{r['dense']:,}",
            ]
            for r in facts["layers"]
        ]
        print_table(f"{model}, {method}, keep {keep}", ["layer", "shape", "codec", "rank", "dense numbers"], rows)
        for part in ("linear_numbers", "model_numbers", "model_bytes"):
            stdout.print(f"{part:18} {facts[part]['before']:>16,} -> {facts[part]['after']:,}")
        stdout.print(f"{'peak memory':18} about {facts['peak_memory_bytes'] / 2**30:.2f} GiB")
        stdout.print(f"{'disk':18} {facts['disk_bytes'] / 2**20:.1f} MiB")
        stdout.print(f"{'time':18} about {facts['seconds']:.0f} s on {facts['device']}")
        for row in facts["untouched"]:
            stdout.print(f"untouched: {row['name']} ({row['numbers']:,} numbers): {row['why']}")

    emit(facts, json_, show)


@app.command()
def inspect(
    folder: ModelArg,
    spectrum: Annotated[bool, typer.Option(help="compute singular values")] = True,
    json_: Json = False,
) -> None:
    """Show what a folder holds: codecs, ranks, sizes, spectra."""
    from spectrim.models.load import resolve
    from spectrim.report.inspect import inspect_folder

    facts = inspect_folder(resolve(folder), spectrum=spectrum)

    def show() -> None:
        rows = []
        for r in facts["layers"]:
            s = r.get("spectrum")
            values = [f"{s[k]:.4g}" for k in ("largest", "smallest", "stable_rank")] if s else ["", "", ""]
            shape = "x".join(map(str, r["shape"]))
            rows.append([r["name"], shape, r["codec"], str(r["rank"]), f"{r['numbers']:,}", *values])
        header = ["layer", "shape", "codec", "rank", "numbers", "largest s", "smallest s", "stable rank"]
        print_table(f"{folder}: {facts['format']}, {facts['dtype']}", header, rows)
        share = facts["linear_numbers"] / facts["linear_numbers_dense"]
        stdout.print(
            f"decoder linears {facts['linear_numbers']:,} numbers (keep {share:.4f}); "
            f"whole model {facts['numbers']:,} numbers, {facts['bytes']:,} bytes",
            markup=False,
        )

    emit(facts, json_, show)


@app.command(name="eval")
def eval_(
    folder: ModelArg,
    against: Annotated[str | None, typer.Option(help="the dense model, for KL and agreement")] = None,
    text: Annotated[str, typer.Option(help="text file(s), hub data set or builtin:stdlib")] = "builtin:stdlib",
    windows: Annotated[int, typer.Option(help="how many windows, at most", min=1)] = 40,
    length: Annotated[int, typer.Option(help="tokens in a window; stride is the same", min=2)] = 512,
    speed: Annotated[bool, typer.Option(help="also measure tokens per second, in the stored dtype")] = True,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Perplexity, and KL and agreement to the dense model, of a folder; computed in float32, as `compress` does."""
    import dataclasses

    import torch

    from spectrim.data import evaluation_windows, load_texts, load_tokenizer
    from spectrim.evaluate.language import evaluate
    from spectrim.evaluate.speed import decode_tokens_per_s
    from spectrim.models.load import check_vocabulary, context_length, load_model, pick_device, resolve

    where, sources = pick_device(device), {"model": resolve(folder)}
    if against is not None:
        sources["dense"] = resolve(against)
    words = load_tokenizer(tokenizer or sources["model"].folder)
    length = min(length, *(context_length(source.config) or length for source in sources.values()))
    tokens = evaluation_windows(load_texts(text, split="evaluation"), words, length=length, count=windows)
    models = {name: load_model(source, where, torch.float32) for name, source in sources.items()}
    facts: dict[str, Any] = {"text": tokens.source, "note": tokens.note, "sha256": tokens.sha256}
    for name, model in models.items():
        check_vocabulary(model, tokens.ids)
        quality = evaluate(model, tokens.ids, dense=models.get("dense") if name == "model" else None)
        facts[name] = dataclasses.asdict(quality)
    if speed:
        for name, model in models.items():
            torch.nn.Module.to(model, sources[name].dtype)  # in place; transformers' own `to` has no usable type
            facts[name]["decode_tokens_per_s"] = decode_tokens_per_s(model)

    def show() -> None:
        keys = ["perplexity", "kl", "agreement", "decode_tokens_per_s"]
        rows = [[n, *(f"{facts[n][k]:.4f}" if facts[n].get(k) is not None else "" for k in keys)] for n in models]
        print_table(
            f"{tokens.source}: {len(tokens.ids)} windows of {tokens.ids.shape[1]} tokens, no overlap",
            ["", "perplexity", "KL (nats)", "agreement", "decode tokens/s"],
            rows,
        )

    emit(facts, json_, show)


@app.command()
def generate(
    folder: ModelArg,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="how many tokens, at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt."""
    import torch

    from spectrim.data import load_tokenizer
    from spectrim.models.load import check_vocabulary, context_length, load_model, pick_device, resolve

    source, where = resolve(folder), pick_device(device)
    words = load_tokenizer(tokenizer or source.folder)
    ids = words(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty; give at least one word")
    limit = context_length(source.config)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise UsageError(
            f"a prompt of {ids.shape[1]} tokens and --max-new-tokens {max_new_tokens} pass the {limit} tokens that "
            "the model reads; shorten one of them"
        )
    model = load_model(source, where)
    check_vocabulary(model, ids)
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **sampling)  # type: ignore[operator]
    text = str(words.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    emit({"prompt": prompt, "text": text}, json_, lambda: stdout.print(prompt + text, soft_wrap=True))


@app.command()
def export(
    folder: ModelArg,
    out: Annotated[Path, typer.Option(help="folder to write")],
    to: Annotated[str, typer.Option(help="dense: multiply the factors back")] = "dense",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT atomically")] = False,
    json_: Json = False,
) -> None:
    """Write a compressed folder in another form."""
    from spectrim.integrations.export import export_dense
    from spectrim.models.load import resolve

    if to != "dense":
        raise UsageError(f"--to {to}: not supported; known: dense")
    facts = export_dense(resolve(folder), out, overwrite=overwrite)
    emit(facts, json_, lambda: stdout.print(f"written to {out}: {facts['numbers']:,} numbers", soft_wrap=True))


@app.command()
def methods(json_: Json = False) -> None:
    """List all methods."""
    from spectrim.registry import METHODS, method_class

    rows = []
    for name in METHODS:
        cls = method_class(name)
        rows.append(
            {
                "name": name,
                "family": cls.info.family,
                "paper": cls.info.paper,
                "needs": sorted(s.value for s in cls.needs),
                "presets": list(cls.presets),
                "promise": cls.info.promise,
            }
        )
    emit(
        rows,
        json_,
        lambda: print_table(
            "methods",
            ["name", "family", "paper", "needs", "presets", "promise"],
            [[r["name"], r["family"], r["paper"], ", ".join(r["needs"]) or "nothing", ", ".join(r["presets"]),
              r["promise"]] for r in rows],
        ),
    )  # fmt: skip
