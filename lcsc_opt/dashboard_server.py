"""Serves the pages of ``dashboards/`` over a study database, on this machine only."""

from __future__ import annotations

from typing import Any
from wsgiref.simple_server import make_server

from optuna.storages import RDBStorage

from lcsc_opt.catalog import find, load_file
from lcsc_opt.errors import StudyStoreError

HOST = "127.0.0.1"
START_PAGE = "optuna"


def serve(storage: RDBStorage, *, port: int) -> None:
    """Serve until interrupted.

    Raises:
        StudyStoreError: when the port is taken.
    """
    page = load_file(find("dashboards", START_PAGE)).build(storage)
    try:
        server = make_server(HOST, port, page, **_quiet_and_threaded())
    except OSError as error:
        raise StudyStoreError(f"port {port}: {error.strerror}; give another --port") from error
    with server:
        server.serve_forever()


def _quiet_and_threaded() -> dict[str, Any]:
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    class Handler(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            """A request is no news."""

    return {"server_class": Server, "handler_class": Handler}
