"""What stands before every page: who may ask, what may be asked, and what an answer may do in a browser."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from werkzeug.wrappers import Request, Response

from lcsc_opt.base.progress import notice

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
CALLBACKS = "/_dash-update-component"  # the only thing of a page that is posted to; it reads
PARAMETER = "token"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Guard:
    """A WSGI application around the whole site.

    Refused with 403: a ``Host`` that is not this machine's (a name that an attacker lets point here), an ``Origin`` or
    ``Sec-Fetch-Site`` of another site, whatever is not a read, and, where there is a token, a request without it.
    An error becomes one line on the terminal; the browser is not told what it was.

    Args:
        inner: the site.
        any_host: accept any ``Host``, as a machine has many names; only with a token, which other sites do not have.
        token: given once as ``?token=``, from then on as a cookie that scripts cannot read.
        cookie: its name; browsers tell cookies apart by host, but not by port.
    """

    def __init__(self, inner: Application, *, any_host: bool, token: str | None, cookie: str) -> None:
        self._inner, self._any_host = inner, any_host and token is not None
        self._token, self._cookie = token, cookie

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Refuse, or ask the site."""
        request = Request(environ)
        refusal = self._refusal(request)
        if refusal is not None:
            return _headed(refusal)(environ, start_response)
        if self._token is not None and not _same(request.cookies.get(self._cookie), self._token):
            return _headed(self._admission(request))(environ, start_response)
        return self._answer(environ)(environ, start_response)

    def _refusal(self, request: Request) -> Response | None:
        if not self._any_host and _host_name(request) not in LOOPBACK_NAMES:
            return _refused("this Host is not served; open the address that lcsc dashboard printed")
        if not _is_same_site(request):
            return _refused("requests from other sites are refused")
        is_callback = request.method == "POST" and request.path.startswith("/lcsc/")
        if request.method not in {"GET", "HEAD"} and not (is_callback and request.path.endswith(CALLBACKS)):
            return _refused("the dashboard only reads; the command line changes studies")
        return None

    def _admission(self, request: Request) -> Response:
        """Of a request without the cookie: in exchange for the token, a cookie and the same address without it."""
        if request.method != "GET" or not _same(request.args.get(PARAMETER), str(self._token)):
            return _refused("open the address with the token that lcsc dashboard printed")
        kept = {name: values for name, values in request.args.lists() if name != PARAMETER}
        address = "/" + quote(request.path.lstrip("/\\")) + (f"?{urlencode(kept, doseq=True)}" if kept else "")
        answer = Response(status=HTTPStatus.SEE_OTHER, headers={"Location": address})
        answer.autocorrect_location_header = False
        answer.set_cookie(self._cookie, str(self._token), httponly=True, samesite="Lax", path="/")
        return answer

    def _answer(self, environ: dict[str, Any]) -> Response:
        try:
            answer = Response.from_app(self._inner, environ, buffered=True)
        except Exception as error:
            notice(f"dashboard: {environ.get('PATH_INFO')}: {type(error).__name__}: {_first_line(error)}")
            answer = _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "this failed; the terminal of lcsc dashboard says why")
        return _headed(answer)


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
    for name, value in HEADERS.items():
        answer.headers.setdefault(name, value)
    answer.headers.pop("Access-Control-Allow-Origin", None)  # which optuna-dashboard sends with artifacts
    return answer


def _refused(reason: str) -> Response:
    return _plain(HTTPStatus.FORBIDDEN, reason)


def _plain(status: HTTPStatus, text: str) -> Response:
    return Response(f"{text}\n", status=status, mimetype="text/plain")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
