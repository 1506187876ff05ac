"""Serves the pages of ``dashboards/`` over one study database, under ``/lcsc/``. Never writes to it.

Every request passes the guard first.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from optuna.storages import RDBStorage
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.views.dashboard.pages import HOME, Application, site

_HOST = "127.0.0.1"
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
}


def serve(storage: RDBStorage, *, port: int, ready: Callable[[str], None] | None = None) -> None:
    """Serve until interrupted, to this machine only; other machines come through ssh.

    Args:
        storage: only read; from here on it refuses to be written to.
        port: to listen on; 0 for any that is free.
        ready: called with the address to open, once the server answers there.

    Raises:
        StudyStoreError: the port is taken.
    """
    try:  # not left to werkzeug, which ends the process where the port is taken
        opened = socket.create_server((_HOST, port), backlog=128)
    except OSError as error:
        raise StudyStoreError(f"port {port} of {_HOST}: {error.strerror}; give another --port") from error
    with contextlib.closing(opened) as listening:
        port = int(listening.getsockname()[1])  # which one is free, where 0 was asked for
        server = make_server(
            _HOST,
            port,
            application(storage),
            threaded=True,
            request_handler=_QuietHandler,
            fd=listening.fileno(),
        )
        if ready is not None:
            ready(f"http://{_HOST}:{port}{HOME}")
        with contextlib.closing(server.socket):
            server.serve_forever()


def application(storage: RDBStorage) -> Application:
    """The whole site as one WSGI application; see :func:`serve`. From here on the storage refuses every write."""
    statement = _READ_ONLY[storage.engine.dialect.name]

    @sa.event.listens_for(storage.engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # else PostgreSQL forgets the setting with the transaction

    storage.engine.dispose()  # connections made before the listener was there
    return guarded(site(storage))


class _QuietHandler(WSGIRequestHandler):
    """Suppresses request logs and the Server header."""

    protocol_version = "HTTP/1.1"
    server_version = "lcsc"
    sys_version = ""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing."""


def guarded(inner: Application) -> Application:
    """A WSGI application around the whole site.

    Refused with 403: a ``Host`` that is not this machine's (a name that an attacker lets point here), an ``Origin`` or
    ``Sec-Fetch-Site`` of another site, and whatever is not a read. An error becomes one line on the terminal; the
    browser is not told what it was.
    """

    @Request.application
    def answer(request: Request) -> Response:
        refusal = _refusal(request)
        if refusal is not None:
            return _with_headers(refusal)
        try:  # buffered: what fails while the body is made is an error of this request, too
            response = Response.from_app(inner, request.environ, buffered=True)
        except Exception as error:
            notice(f"dashboard: {request.path}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            text = "this failed; the terminal of lcsc dashboard says why\n"
            response = Response(text, status=HTTPStatus.INTERNAL_SERVER_ERROR, mimetype="text/plain")
        return _with_headers(response)

    return answer


def _refusal(request: Request) -> Response | None:
    """The answer to a request that is refused; ``None`` if it may pass."""
    # the only thing of a page that is posted to; it reads
    is_of_page = request.path.startswith(HOME) and request.path.endswith("/_dash-update-component")
    is_callback = request.method == "POST" and is_of_page
    if _host_name(request) not in _LOOPBACK_NAMES:
        reason = "this Host is not served; open the address that lcsc dashboard printed"
    elif not _is_same_site(request):
        reason = "requests from other sites are refused"
    elif request.method not in {"GET", "HEAD"} and not is_callback:
        reason = "the dashboard only reads; the command line changes studies"
    else:
        return None
    return Response(f"{reason}\n", status=HTTPStatus.FORBIDDEN, mimetype="text/plain")


def _is_same_site(request: Request) -> bool:
    """Whether a request comes from our own pages, from an address bar or link, or from no browser.

    Browsers send ``Origin`` with what may change something, and ``Sec-Fetch-Site`` with everything.
    """
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
        return False
    if request.headers.get("Sec-Fetch-Site") in {None, "same-origin", "none"}:
        return True
    return request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"


def _host_name(request: Request) -> str | None:
    """The name in the ``Host`` header, without the port; ``None`` for a header that cannot be read."""
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname
    except ValueError:
        return None


def _with_headers(answer: Response) -> Response:
    """The answer with our headers; those that a page has set itself stay."""
    for name, value in _HEADERS.items():
        answer.headers.setdefault(name, value)
    answer.headers.pop("Access-Control-Allow-Origin", None)  # of a page that is somebody else's application
    return answer
