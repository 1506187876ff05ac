"""The pages of the dashboard: each file of ``dashboards/`` at its address, with a menu of all of them.

A file's ``build(storage)`` gives a ``dash.Dash`` app, which gets the menu and the look, or any WSGI application. A file
that cannot be loaded leaves a line that says why, on its own page; the others work.
"""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from optuna.storages import RDBStorage
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.shared_data import SharedDataMiddleware
from werkzeug.wrappers import Request, Response

from lcsc_opt.base.catalog import entries, load_file
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import notice
from lcsc_opt.database.urls import masked

if TYPE_CHECKING:
    import dash

HOME = "/lcsc/"
_FIRST = ("compare", "study", "images", "landscape")  # in the menu; others follow by name
_ROOT = "optuna"  # the one that is not under HOME, since it links to itself from the root
_ROOT_TITLE, ROOT_PATH = "optuna-dashboard", "/dashboard/"
_STATIC = f"{HOME}_static"
_POLICY = {
    "default-src": "'self'",
    "img-src": "'self' data: blob:",
    "style-src": "'self' 'unsafe-inline'",
    "object-src": "'none'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'self'",
}
_ARTIFACT_POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; sandbox"

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def site(storage: RDBStorage) -> Application:
    """Every page over ``storage``, as one WSGI application."""
    files = {name: file.resolve() for name, file in entries("dashboards").items()}
    others = sorted(files.keys() - {_ROOT, *_FIRST})
    menu = {name: f"{HOME}{quote(name)}" for name in (*_FIRST, *others) if name in files}
    source = masked(storage.url)
    mounts = {path: _page(storage, name, files[name], _header(menu, name, source)) for name, path in menu.items()}
    home = _redirect(next(iter(menu.values()), ROOT_PATH))
    static = SharedDataMiddleware(home, {"/_static": str(Path(__file__).parent / "static")}, cache=False)
    root = _root(storage, files[_ROOT]) if _ROOT in files else _redirect(HOME)
    mounted: Application = DispatcherMiddleware(root, {**mounts, HOME.rstrip("/"): static})
    return mounted


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _page(storage: RDBStorage, name: str, file: Path, header: str) -> Application:
    """One page of ours; a file that fails becomes a page that says so."""
    try:
        with _addressed(name):
            built = load_file(file).build(storage)
        server = _dressed(built, name, header) if hasattr(built, "index_string") else built
        if not callable(server):
            return _broken(header, name, f"{file}: build(storage) gave {type(built).__name__}, expected a dash.Dash")
    except LcscError as error:
        return _broken(header, name, str(error))
    except Exception as error:
        return _broken(header, name, f"{file}: build(storage) raised {type(error).__name__}: {error}")

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The address of a page without a slash at its end is that of the page."""
        return server({**environ, "PATH_INFO": environ.get("PATH_INFO") or "/"}, start_response)

    return answer


@contextlib.contextmanager
def _addressed(name: str) -> Iterator[None]:
    """Dash apps that are made meanwhile know where they are mounted: they read it from the environment."""
    prefixes = {"DASH_ROUTES_PATHNAME_PREFIX": "/", "DASH_REQUESTS_PATHNAME_PREFIX": f"{HOME}{quote(name)}/"}
    before = {key: os.environ.pop(key, None) for key in (*prefixes, "DASH_URL_BASE_PATHNAME")}
    os.environ.update(prefixes)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _dressed(app: dash.Dash, name: str, header: str) -> Application:
    """Give a Dash app the menu, the look and a policy; what it sets itself stays."""
    if app.title == "Dash":
        app.title = _title(name)
    app.title = f"{app.title} · lcsc"
    page = app.index_string.replace("<html>", '<html lang="en">', 1)
    page = page.replace("</head>", f"{_head()}</head>", 1)
    app.index_string = page.replace("<body>", f"<body>{header}<div id='content' tabindex='-1'></div>", 1)
    server: Any = app.server

    def protect(answer: Any) -> Any:
        answer.headers.setdefault("Content-Security-Policy", _policy(" ".join(["'self'", *app.csp_hashes()])))
        return answer

    server.after_request(protect)
    application: Application = server
    return application


def _policy(scripts: str = "'self'") -> str:
    return "; ".join(f"{name} {value}" for name, value in {**_POLICY, "script-src": scripts}.items())


def _head() -> str:
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="stylesheet" href="{_STATIC}/lcsc.css"><script src="{_STATIC}/lcsc.js"></script>'
    )


def _header(menu: Mapping[str, str], current: str, source: str) -> str:
    """The menu: real links, the current page marked, and the switch between light and dark."""
    links = "".join(
        f'<a href="{path}" data-page{" aria-current=page" if name == current else ""}>{html.escape(_title(name))}</a>'
        for name, path in menu.items()
    )
    return (
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header class="site"><nav aria-label="Pages">{links}<a href="{ROOT_PATH}">{_ROOT_TITLE}</a></nav>'
        f'<span class="source" title="the study database">{html.escape(source)}</span>'
        '<button type="button" id="theme-switch" aria-pressed="false">Dark</button></header>'
    )


def _broken(header: str, name: str, problem: str) -> Application:
    """A page that says what is wrong with its file."""
    line = " ".join(problem.split())
    notice(f"dashboard: {line}")
    text = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(_title(name))} · lcsc</title>'
        f'{_head()}</head><body>{header}<main id="content"><h1>{html.escape(_title(name))}</h1>'
        f'<p class="problem" role="alert">{html.escape(line)}</p>'
        "<p>The other pages work. Correct the file, and start lcsc dashboard again.</p></main></body></html>"
    )
    headers = {"Content-Security-Policy": _policy()}
    return Response(text, HTTPStatus.INTERNAL_SERVER_ERROR, headers, mimetype="text/html")


def _redirect(path: str) -> Application:
    """To the first page from the address that leads to none; nothing else is there."""

    @Request.application
    def answer(request: Request) -> Response:
        if request.path.strip("/"):
            return Response("no such page\n", HTTPStatus.NOT_FOUND, mimetype="text/plain")
        return Response(status=HTTPStatus.FOUND, headers={"Location": path}, mimetype="text/plain")

    application: Application = answer
    return application


def _root(storage: RDBStorage, file: Path) -> Application:
    """optuna-dashboard, but for the bare address, which leads to our pages; files that it shows cannot run scripts."""
    try:
        inner: Application = load_file(file).build(storage)
    except Exception as error:
        notice(f"dashboard: {file}: {type(error).__name__}: {error}")
        return _redirect(HOME)

    @Request.application
    def answer(request: Request) -> Response:
        if request.path == "/":
            return Response(status=HTTPStatus.FOUND, headers={"Location": HOME}, mimetype="text/plain")
        found = Response.from_app(inner, request.environ, buffered=True)
        if request.path.startswith("/artifacts/"):
            found.headers["Content-Security-Policy"] = _ARTIFACT_POLICY
        return found

    application: Application = answer
    return application
