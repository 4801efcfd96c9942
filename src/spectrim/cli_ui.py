"""`spectrim ui`: a page in the browser on which the size of a model is a slider."""

from time import sleep
from typing import Annotated

import typer

from spectrim.cli_options import Device, Json, ModelArg, Tokenizer
from spectrim.terminal import emit, stdout


def ui(
    folder: ModelArg,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 lets others in")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="port (default: the first free one from 7860)", min=1, max=65535)
    ] = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Show a folder that holds all sizes on a page with a slider (extra `ui`); Ctrl-C ends it."""
    from spectrim.data import load_tokenizer
    from spectrim.integrations.gradio import require_gradio, serve
    from spectrim.integrations.sizes import Sizes
    from spectrim.models.load import pick_device, resolve

    source = resolve(folder)
    sizes = Sizes(source, load_tokenizer(tokenizer or source.folder), pick_device(device))
    require_gradio()  # only now: nobody shall install it to be told that this folder has no sizes
    page, address = serve(sizes, host=host, port=port)
    try:
        emit({"address": address}, json_, lambda: stdout.print(f"open {address} (Ctrl-C ends it)", soft_wrap=True))
        while page.is_running:
            sleep(0.2)
    except BaseException as stop:
        stop.add_note("the page is closed")  # what the message about the signal says
        raise
    finally:
        page.close(verbose=False)
