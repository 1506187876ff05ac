"""``lcsc dashboard``."""

from __future__ import annotations

from typing import Annotated

import typer

from lcsc_opt.cli.options import Storage
from lcsc_opt.cli.output import say


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Others can reach anything but loopback: they need a token then."),
    ] = "127.0.0.1",
    storage: Storage = None,
) -> None:
    """Compare optimizers in the browser, live. Studies are only read; optuna-dashboard runs next to it."""
    from lcsc_opt.database.connection import open_even_empty
    from lcsc_opt.database.urls import masked, storage_url
    from lcsc_opt.views.dashboard.server import is_loopback, new_token, serve

    url = storage_url(storage)
    opened = open_even_empty(url)
    token = None if is_loopback(host) else new_token()

    def tell(address: str) -> None:
        say(f"{address} shows {masked(url)}; Ctrl-C ends it")

    serve(opened, port=port, host=host, token=token, ready=tell)
