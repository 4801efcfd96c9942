"""`spectrim eval`: a model on text and on tasks, beside its dense model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli_options import Device, Json, ModelArg, Seed, Size, Tokenizer
from spectrim.errors import InputError, UsageError
from spectrim.terminal import emit, print_table, progress_printer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spectrim.data import Windows
    from spectrim.models.load import Source


def eval_(
    folder: ModelArg,
    size: Size = None,
    against: Annotated[str | None, typer.Option(help="the dense model, for KL and agreement")] = None,
    text: Annotated[
        str, typer.Option(help="text file(s), hub data set, builtin:stdlib, or self: sampled from --against")
    ] = "builtin:stdlib",
    windows: Annotated[int, typer.Option(help="how many windows, at most", min=1)] = 40,
    length: Annotated[int, typer.Option(help="tokens in a window; stride is the same", min=2)] = 512,
    speed: Annotated[bool, typer.Option(help="also measure tokens per second, in the stored dtype")] = True,
    tasks: Annotated[list[str], typer.Option(help="task file or folder, see docs/tasks.md; may be repeated")] = [],  # noqa: B006
    task_limit: Annotated[int | None, typer.Option(help="items of each task, at most, drawn by --seed", min=1)] = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Perplexity, KL and agreement to the dense model, and accuracy on tasks; in float32, as `compress` does."""
    if task_limit is not None and not tasks:
        raise UsageError("--task-limit applies to --tasks, which is not given")
    if text == "self" and against is None:
        raise UsageError("--text self samples the text from the dense model; name it with --against")
    import dataclasses

    import torch

    from spectrim.data import held_out_samples, load_tasks
    from spectrim.evaluate.language import evaluate
    from spectrim.evaluate.speed import decode_tokens_per_s
    from spectrim.evaluate.tasks import evaluate_tasks
    from spectrim.models.load import check_vocabulary, context_length, load_model, pick_device, resolve
    from spectrim.processes import joined
    from spectrim.report import tasks as task_table

    with joined(device) as group:
        if not group.alone and (tasks or text == "self"):
            raise UsageError(
                f"--tasks and --text self are for one process, and there are {group.world}; leave them out, or run "
                "without torchrun"
            )
        asked = load_tasks(tasks, limit=task_limit, seed=seed) if tasks else None
        where, sources = pick_device(device), {"model": resolve(folder)}
        if against is not None:
            sources["dense"] = resolve(against)
        words = None if text == "self" and asked is None else _tokenizer(tokenizer, sources["model"])
        length = min(length, *(context_length(source.config) or length for source in sources.values()))
        read = None if text == "self" or words is None else _read(text, words, length, windows)
        models = {
            name: load_model(source, where, torch.float32, size=size if name == "model" else None)
            for name, source in sources.items()
        }
        tokens = read or held_out_samples(models["dense"], length=length, count=windows, seed=seed)
        facts: dict[str, Any] = {"text": tokens.source, "note": tokens.note, "sha256": tokens.sha256, "size": size}
        for name, model in models.items():
            check_vocabulary(model, tokens.ids)
            quality = evaluate(model, tokens.ids, dense=models.get("dense") if name == "model" else None)
            facts[name] = dataclasses.asdict(quality)
        results = []
        if asked is not None and words is not None:
            progress = progress_printer(json_)
            results = evaluate_tasks(models["model"], words, asked.tasks, dense=models.get("dense"), progress=progress)
            facts |= {"tasks": [task_table.facts(result) for result in results], "tasks_skipped": asked.skipped}
        if speed and group.is_first:
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
            if asked is not None:
                task_table.show(results, asked.skipped)

        if group.is_first:
            emit(facts, json_, show)


def _tokenizer(given: str | None, source: "Source") -> "PreTrainedTokenizerBase":
    from spectrim.data import load_tokenizer

    try:
        return load_tokenizer(given or source.folder)
    except InputError as error:
        raise InputError(f"{error}, or --text self --against DENSE, which needs no tokenizer") from error


def _read(text: str, words: "PreTrainedTokenizerBase", length: int, windows: int) -> "Windows":
    from spectrim.data import evaluation_windows, load_texts

    return evaluation_windows(load_texts(text, split="evaluation"), words, length=length, count=windows)
