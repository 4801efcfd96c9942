"""The page of `spectrim ui`, made with Gradio (extra `ui`): a slider for the size, both models side by side.

It listens on this machine alone unless told otherwise, is shared with nobody, and reports nothing.
"""

import os
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from spectrim.errors import ResourceError, SpectrimError, UsageError
from spectrim.integrations.sizes import FULL, Sizes, rows_of
from spectrim.models.load import context_length

PROMPT = "The history of"
TEXT = "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised to see it."
STEP = 0.01
NEW_TOKENS, MOST_NEW_TOKENS = 40, 256
API = "compare"
"""The name of the one function that programs may call (`/gradio_api/call/compare`)."""
STYLE = """
.figures table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.figures caption { text-align: left; padding-bottom: .4rem; }
.figures th, .figures td { text-align: right; padding: .35rem .4rem; border-bottom: 1px solid; }
.figures th:first-child, .figures td:first-child { text-align: left; font-weight: 400; }
"""


def require_gradio() -> None:
    """UsageError that names the extra where Gradio is not installed."""
    if find_spec("gradio") is None:
        raise UsageError("spectrim ui needs gradio: pip install 'spectrim[ui]'")


def comparison(sizes: Sizes, size: float, prompt: str, text: str, new_tokens: float) -> dict[str, Any]:
    """What a program gets: both continuations, and the figures as rows of name, full size, chosen size."""
    full, small = sizes.compare(size, prompt, text, int(new_tokens))
    return {"full": full.text, "chosen": small.text, "figures": [list(row) for row in rows_of(full, small)]}


def table_of(rows: Sequence[Sequence[str]], size: float) -> str:
    """The figures as HTML."""
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(full)}</td><td>{escape(small)}</td></tr>'
        for name, full, small in rows
    )
    return (
        f'<table><caption>Figures of both sizes</caption><thead><tr><td></td><th scope="col">full size</th>'
        f'<th scope="col">size {size:g}</th></tr></thead><tbody>{cells}</tbody></table>'
    )


def serve(sizes: Sizes, *, host: str, port: int | None) -> tuple[Any, str]:
    """Start the page in threads of its own: the running Blocks and its address. ResourceError for a port in use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and when it starts
    import gradio  # type: ignore[import-not-found]

    page = build(gradio, sizes)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
            ssr_mode=False, footer_links=["api"], theme=theme(gradio), css=STYLE,
        )  # fmt: skip
    except OSError as error:
        where = "7860 to 7959" if port is None else str(port)
        raise ResourceError(f"no page on {host}, port {where}: {error}; choose a free one with --port") from error
    return page, address


def theme(gradio: Any) -> Any:
    """Gradio's own, with letters that are dark enough to read."""
    return gradio.themes.Default(primary_hue="blue").set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
    )  # fmt: skip


def build(gradio: Any, sizes: Sizes) -> Any:
    """The page itself: everything that can be set has a label, results are text."""

    def called(size: float, prompt: str, text: str = "", new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
        try:
            return comparison(sizes, size, prompt, text, new_tokens)
        except SpectrimError as error:  # shown on the page; the program goes on
            raise gradio.Error(str(error), title="This cannot be done") from error

    def shown(size: float, prompt: str, text: str, new_tokens: int) -> tuple[str, str, str]:
        found = called(size, prompt, text, new_tokens)
        return found["full"], found["chosen"], table_of(found["figures"], size)

    room = context_length(sizes.source.config) or 2 * MOST_NEW_TOKENS
    with gradio.Blocks(title=f"{sizes.source.name}: every size", analytics_enabled=False) as page:
        gradio.Markdown("# Every size of one model\nThe full model beside the size that you choose.")
        size = gradio.Slider(
            sizes.smallest, FULL, value=sizes.first, step=STEP, label="Size", buttons=[],
            info="share of the numbers in the decoder's linear layers that remains",
        )  # fmt: skip
        with gradio.Row():
            prompt = gradio.Textbox(PROMPT, label="Prompt", info="both go on with it, greedily", lines=4, min_width=300)
            text = gradio.Textbox(
                TEXT, label="Text to judge by", info="empty: no perplexity is measured", lines=4, min_width=300
            )
        new_tokens = gradio.Slider(
            1, min(MOST_NEW_TOKENS, room // 2), value=min(NEW_TOKENS, room // 2), step=1, label="New tokens", buttons=[]
        )
        button = gradio.Button("Compare", variant="primary")
        with gradio.Row():
            full = gradio.Textbox(label="Full size", lines=6, interactive=False, min_width=300)
            small = gradio.Textbox(label="Chosen size", lines=6, interactive=False, min_width=300)
        table = gradio.HTML(label="Figures", elem_classes="figures")
        one_by_one: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
        gradio.on(
            [button.click, size.release, page.load], shown, [size, prompt, text, new_tokens], [full, small, table],
            api_visibility="private", **one_by_one,
        )  # fmt: skip
        gradio.api(called, api_name=API, **one_by_one)
    return page
