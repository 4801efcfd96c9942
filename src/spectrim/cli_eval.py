"""`spectrim eval`: a model on text and on tasks, beside its dense model."""

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli_options import Device, Json, ModelArg, Seed, Size, Tokenizer
from spectrim.errors import UsageError
from spectrim.terminal import emit, progress_printer


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
    metrics: Annotated[
        list[str],
        typer.Option(help="repetition, nuclear-norm, entropy, kick, forgetting (docs/eval.md); may be repeated"),
    ] = [],  # noqa: B006
    questions: Annotated[Path | None, typer.Option(help="JSONL of question, answers (evidence), for kick")] = None,
    gap: Annotated[list[str], typer.Option(help="TASK:SHIFTED, two of --tasks, for forgetting; may be repeated")] = [],  # noqa: B006
    lm_eval: Annotated[
        list[str], typer.Option(help="task of lm-evaluation-harness (extra `eval`); may be repeated")
    ] = [],  # noqa: B006
    lm_eval_include: Annotated[Path | None, typer.Option(help="folder of task files (YAML) of that harness")] = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Perplexity, KL and agreement to the dense model, and accuracy on tasks; in float32, as `compress` does."""
    if task_limit is not None and not (tasks or lm_eval):
        raise UsageError("--task-limit applies to --tasks, which is not given")
    if text == "self" and against is None:
        raise UsageError("--text self samples the text from the dense model; name it with --against")
    from spectrim.eval_job import EvalRequest, run_eval
    from spectrim.processes import joined
    from spectrim.report.evaluation import show_evaluation

    request = EvalRequest(
        model=folder, size=size, against=against, text=text, windows=windows, length=length, speed=speed,
        tasks=tuple(tasks), task_limit=task_limit, metrics=words_of(metrics), questions=questions, gaps=tuple(gap),
        harness=words_of(lm_eval), harness_folder=lm_eval_include, tokenizer=tokenizer, device=device, seed=seed,
    )  # fmt: skip
    with joined(device) as group:
        facts, results = run_eval(request, progress=progress_printer(json_))
        if group.is_first:
            emit(facts, json_, lambda: show_evaluation(facts, results))


def words_of(given: list[str]) -> tuple[str, ...]:
    """Names that were given one by one, or with commas between them."""
    return tuple(word.strip() for text in given for word in text.split(",") if word.strip())
