"""Does a model still write Python? The share of completions of function headers that `ast.parse` accepts.

A stand-in for running tests on generated code, which needs a sandbox: it sees syntax and layout, not meaning. A prompt
is the header of a top-level function and its docstring; the completion is greedy, and ends before the first line that
leaves the function. What the token limit cut off in the middle of a line is dropped. An empty body is not accepted.
"""

import ast
import textwrap
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.engines.measure import frozen
from spectrim.models.walk import device_of

LONGEST_PROMPT_CHARS = 600


def function_prompts(source: str) -> Iterator[str]:
    """Header and docstring of every top-level function of `source` that has a docstring, ending in a new line.

    Source that does not parse has none.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            prompt = textwrap.dedent("".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
            if len(prompt) <= LONGEST_PROMPT_CHARS and "\t" not in prompt:
                yield prompt


def function_body(completion: str, *, cut_off: bool) -> str:
    """The lines of a completion that belong to the function; `cut_off`: it did not end by itself."""
    lines = completion.splitlines(keepends=True)
    if cut_off and lines and not lines[-1].endswith("\n"):
        lines = lines[:-1]
    body: list[str] = []
    for line in lines:
        if line.strip() and not line.startswith((" ", "\t")):
            return "".join(body)
        body.append(line)
    return "".join(body)


def parses(prompt: str, completion: str, *, cut_off: bool) -> bool:
    """Whether prompt and completion are a function with a body that `ast.parse` accepts."""
    body = function_body(completion, cut_off=cut_off)
    if not body.strip():
        return False
    try:
        tree = ast.parse(prompt + body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef) and len(tree.body[0].body) > 1


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, tokens: int) -> str:
    """The greedy completion of a prompt, at most `tokens` long."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=device_of(model))
    with frozen(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)  # pyright: ignore
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def parse_share(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int = 48
) -> float:
    """Share of `prompts` whose completion is accepted."""
    if not prompts:
        raise ValueError("parse_share needs at least one prompt")
    accepted = [parses(p, complete(model, tokenizer, p, tokens=tokens), cut_off=True) for p in prompts]
    return sum(accepted) / len(accepted)
