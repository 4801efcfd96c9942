"""How much of a prompt and of a continuation a model's context has room for."""

from transformers import PretrainedConfig

from spectrim.models.load import context_length


def within_context(config: PretrainedConfig, prompt: int, new: int) -> tuple[int, int]:
    """Tokens of the prompt and of the continuation that the model reads at once; (0, 0) where there is room for none.

    Where both do not fit, the prompt takes half of the context at most.
    """
    context = context_length(config)
    if context is None or prompt + new <= context:
        return prompt, new
    prompt = min(prompt, context // 2)
    return (prompt, min(new, context - prompt)) if prompt else (0, 0)
