"""Serves the pages of ``dashboards/`` and the whole of optuna-dashboard over one study database. Never writes to it.

Ours are under ``/lcsc/``, a page for each file; optuna-dashboard is at ``/``. Every request passes the guard first.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import sqlalchemy as sa
from optuna.storages import RDBStorage
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.views.dashboard.pages import HOME, Application, site

_HOST = "127.0.0.1"
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_CALLBACKS = "/_dash-update-component"  # the only thing of a page that is posted to; it reads
_PARAMETER = "token"
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
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}


def serve(storage: RDBStorage, *, port: int, host: str = _HOST, ready: Callable[[str], None] | None = None) -> None:
    """Serve until interrupted. If other machines can reach the address, every request must carry a token.

    Args:
        storage: only read; from here on it refuses to be written to.
        port: to listen on; 0 for any that is free.
        host: an address of this machine.
        ready: called with the address to open, with the token, once the server answers there.

    Raises:
        StudyStoreError: the port is taken, or the address is none of this machine's.
    """
    token = None if _is_loopback(host) else secrets.token_urlsafe(32)
    with contextlib.closing(_listen(host, port)) as listening:
        port = int(listening.getsockname()[1])
        guarded = application(storage, token=token, cookie=f"lcsc_token_{port}")
        server = make_server(host, port, guarded, threaded=True, request_handler=_QuietHandler, fd=listening.fileno())
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{port}{HOME}" + ("" if token is None else f"?token={token}"))
        with contextlib.closing(server.socket):
            server.serve_forever()


def application(storage: RDBStorage, *, token: str | None = None, cookie: str = "lcsc_token") -> Guard:
    """The whole site as one WSGI application; see :func:`serve`. From here on the storage refuses every write."""
    statement = _READ_ONLY.get(storage.engine.dialect.name)
    if statement is not None:

        @sa.event.listens_for(storage.engine, "connect")
        def _connect(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            cursor.execute(statement)
            cursor.close()
            connection.commit()

        storage.engine.dispose()  # connections made before the listener was there
    return Guard(site(storage), token=token, cookie=cookie)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


class Guard:
    """A WSGI application around the whole site.

    Refused with 403: a ``Host`` that is not this machine's (a name that an attacker lets point here), an ``Origin`` or
    ``Sec-Fetch-Site`` of another site, whatever is not a read, and, where there is a token, a request without it.
    An error becomes one line on the terminal; the browser is not told what it was.

    Args:
        inner: the site.
        token: given once as ``?token=``, from then on as a cookie that scripts cannot read. With one, any ``Host`` is
            accepted, as a machine has many names: other sites do not have the token.
        cookie: its name; browsers tell cookies apart by host, but not by port.
    """

    def __init__(self, inner: Application, *, token: str | None = None, cookie: str = "lcsc_token") -> None:
        self._inner, self._token, self._cookie = inner, token, cookie

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Refuse, or ask the site."""
        request = Request(environ)
        refusal = self._refusal(request)
        if refusal is not None:
            return _headed(refusal)(environ, start_response)
        if self._token is not None and not _same(request.cookies.get(self._cookie), self._token):
            return _headed(self._admission(request))(environ, start_response)
        try:
            answer = Response.from_app(self._inner, environ, buffered=True)
        except Exception as error:
            notice(f"dashboard: {request.path}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            said = "this failed; the terminal of lcsc dashboard says why\n"
            answer = Response(said, status=HTTPStatus.INTERNAL_SERVER_ERROR, mimetype="text/plain")
        return _headed(answer)(environ, start_response)

    def _refusal(self, request: Request) -> Response | None:
        if self._token is None and _host_name(request) not in _LOOPBACK_NAMES:
            return _refused("this Host is not served; open the address that lcsc dashboard printed")
        if not _is_same_site(request):
            return _refused("requests from other sites are refused")
        is_callback = request.method == "POST" and request.path.startswith("/lcsc/")
        if request.method not in {"GET", "HEAD"} and not (is_callback and request.path.endswith(_CALLBACKS)):
            return _refused("the dashboard only reads; the command line changes studies")
        return None

    def _admission(self, request: Request) -> Response:
        """Of a request without the cookie: in exchange for the token, a cookie and the same address without it."""
        if request.method != "GET" or not _same(request.args.get(_PARAMETER), str(self._token)):
            return _refused("open the address with the token that lcsc dashboard printed")
        kept = {name: values for name, values in request.args.lists() if name != _PARAMETER}
        address = "/" + quote(request.path.lstrip("/\\")) + (f"?{urlencode(kept, doseq=True)}" if kept else "")
        answer = Response(status=HTTPStatus.SEE_OTHER, headers={"Location": address})
        answer.autocorrect_location_header = False
        answer.set_cookie(self._cookie, str(self._token), httponly=True, samesite="Lax", path="/")
        return answer


def _is_same_site(request: Request) -> bool:
    """Whether a request comes from our own pages, from an address bar or link, or from no browser."""
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
        return False
    if request.headers.get("Sec-Fetch-Site") in {None, "same-origin", "none"}:
        return True
    return request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"


def _host_name(request: Request) -> str | None:
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname
    except ValueError:
        return None


def _same(given: str | None, expected: str) -> bool:
    """Takes as long whether or not the beginning is right."""
    return given is not None and hmac.compare_digest(given.encode(), expected.encode())


def _headed(answer: Response) -> Response:
    for name, value in _HEADERS.items():
        answer.headers.setdefault(name, value)
    answer.headers.pop("Access-Control-Allow-Origin", None)  # which optuna-dashboard sends with artifacts
    return answer


def _refused(reason: str) -> Response:
    return Response(f"{reason}\n", status=HTTPStatus.FORBIDDEN, mimetype="text/plain")
