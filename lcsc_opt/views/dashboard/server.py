"""Serves the pages of ``dashboards/`` and the whole of optuna-dashboard over one study database. Never writes to it.

Ours are under ``/lcsc/``, a page for each file; optuna-dashboard is at ``/``. Every request passes the guard first.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Callable
from typing import Any

from optuna.storages import RDBStorage
from werkzeug.serving import WSGIRequestHandler, make_server

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.views.dashboard.guard import Guard
from lcsc_opt.views.dashboard.pages import HOME, site
from lcsc_opt.views.dashboard.parts import forbid_writing, shared_reader

__all__ = ["HOST", "application", "forbid_writing", "is_loopback", "new_token", "serve", "shared_reader"]

HOST = "127.0.0.1"


def serve(
    storage: RDBStorage,
    *,
    port: int,
    host: str = HOST,
    token: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        storage: only read; from here on it refuses to be written to.
        port: to listen on; 0 for any that is free.
        host: an address of this machine. Anything but loopback needs a token.
        token: what every request must carry.
        ready: called with the address to open, once the server answers there.

    Raises:
        StudyStoreError: the port is taken, or the address is none of this machine's.
        StudySpecError: others could reach it without a token.
    """
    if token is None and not is_loopback(host):
        raise StudySpecError(f"host {host}: others can reach it, so every request must carry a token")
    with contextlib.closing(_listen(host, port)) as listening:
        port = int(listening.getsockname()[1])
        guarded = application(storage, host=host, token=token, cookie=f"lcsc_token_{port}")
        server = make_server(host, port, guarded, threaded=True, request_handler=_QuietHandler, fd=listening.fileno())
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{port}{HOME}" + ("" if token is None else f"?token={token}"))
        with contextlib.closing(server.socket):
            server.serve_forever()


def application(
    storage: RDBStorage, *, host: str = HOST, token: str | None = None, cookie: str = "lcsc_token"
) -> Guard:
    """The whole site as one WSGI application; see :func:`serve`."""
    forbid_writing(storage)
    return Guard(site(storage), any_host=not is_loopback(host), token=token, cookie=cookie)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """One that cannot be guessed."""
    return secrets.token_urlsafe(32)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StudyStoreError(f"host {host}: {error.strerror}; give an address of this machine as --host") from error
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise StudyStoreError(f"port {port} of {host}: {error.strerror}; give another --port or --host") from error
    return listening


class _QuietHandler(WSGIRequestHandler):
    """A request is no news, and who serves is nobody's business."""

    protocol_version = "HTTP/1.1"
    server_version = "lcsc"
    sys_version = ""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing."""
