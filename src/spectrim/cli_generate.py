"""`spectrim generate`: continue a prompt."""

from typing import Annotated

import typer

from spectrim.cli_options import Device, Json, ModelArg, Seed, Size, Tokenizer
from spectrim.terminal import emit, stdout


def generate(
    folder: ModelArg,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    size: Size = None,
    max_new_tokens: Annotated[int, typer.Option(help="how many tokens, at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt."""
    from spectrim.data import load_tokenizer
    from spectrim.evaluate.continuation import continued, prompt_ids
    from spectrim.models.load import load_model, pick_device, resolve

    source, where = resolve(folder), pick_device(device)
    words = load_tokenizer(tokenizer or source.folder)
    ids = prompt_ids(words, prompt, source.config, max_new_tokens)
    model = load_model(source, where, size=size)
    text = continued(model, words, ids, max_new_tokens, temperature=temperature, seed=seed)
    emit({"prompt": prompt, "text": text}, json_, lambda: stdout.print(prompt + text, soft_wrap=True))
