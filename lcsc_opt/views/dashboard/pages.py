"""The pages of the dashboard: each file of ``dashboards/`` at its address, with a menu of all of them.

A file's ``build(storage)`` gives a ``dash.Dash`` app, which gets the menu and the look.
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
from lcsc_opt.database.urls import masked

if TYPE_CHECKING:
    import dash

HOME = "/lcsc/"
_MENU_START = ("compare", "study", "images", "landscape")  # other pages follow by name
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

_NO_SCRIPT = (
    "<noscript><p>This page needs JavaScript. Without it, the commands lcsc compare and lcsc report show the same."
    "</p></noscript>"
)

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def site(storage: RDBStorage) -> Application:
    """Every page over ``storage``, as one WSGI application."""
    files = {name: file.resolve() for name, file in entries("dashboards").items()}
    names = [name for name in _MENU_START if name in files]
    names += sorted(files.keys() - {*_MENU_START})
    menu = {name: f"{HOME}{quote(name)}" for name in names}
    mounts = {path: _page(storage, name, files[name], _header(storage, menu, name)) for name, path in menu.items()}
    first_page = next(iter(menu.values()))
    static_files = {"/_static": str(Path(__file__).parent / "static")}
    # not cached: after an update of lcsc_opt, a browser would keep the old scripts for twelve hours
    mounts[HOME.rstrip("/")] = SharedDataMiddleware(_redirect(first_page), static_files, cache=False)
    return DispatcherMiddleware(_redirect(HOME), mounts)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _page(storage: RDBStorage, name: str, file: Path, header: str) -> Application:
    """One page of ours.

    Raises:
        StudySpecError: the file cannot be loaded.
        Exception: what its ``build`` raises.
    """
    with _mounted_at(name):
        built = load_file(file).build(storage)
    server = _with_menu(built, name, header)

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer at the page's address with a slash at its end, and without."""
        return server({**environ, "PATH_INFO": environ.get("PATH_INFO") or "/"}, start_response)

    return answer


@contextlib.contextmanager
def _mounted_at(name: str) -> Iterator[None]:
    """Tell Dash apps that are made meanwhile where they are mounted: they read it from the environment."""
    prefixes = {
        "DASH_ROUTES_PATHNAME_PREFIX": "/",
        "DASH_REQUESTS_PATHNAME_PREFIX": f"{HOME}{quote(name)}/",
    }
    previous = {key: os.environ.pop(key, None) for key in (*prefixes, "DASH_URL_BASE_PATHNAME")}
    os.environ.update(prefixes)
    try:
        yield
    finally:
        for key, value in previous.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _with_menu(app: dash.Dash, name: str, header: str) -> Application:
    """Give a Dash app the menu, the styles and a content policy; a policy of its own stays."""
    if app.title == "Dash":  # the default: the author gave it none
        app.title = _title(name)
    app.title = f"{app.title} · lcsc"
    page = app.index_string.replace("<html>", '<html lang="en">', 1)
    page = page.replace("</head>", f"{_head()}</head>", 1)
    # the link that skips the menu leads to this empty division
    app.index_string = page.replace("<body>", f"<body>{header}<div id='content' tabindex='-1'></div>{_NO_SCRIPT}", 1)
    server: Any = app.server

    def protect(answer: Any) -> Any:
        # not before: an app has all its inline scripts only when Dash has made its page
        scripts = " ".join(["'self'", *app.csp_hashes()])
        directives = {**_POLICY, "script-src": scripts}
        policy = "; ".join(f"{name} {value}" for name, value in directives.items())
        answer.headers.setdefault("Content-Security-Policy", policy)
        return answer

    server.after_request(protect)
    application: Application = server
    return application


def _head() -> str:
    scripts = "".join(f'<script src="{_STATIC}/{name}.js"></script>' for name in ("narrow", "lcsc"))
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="stylesheet" href="{_STATIC}/lcsc.css">{scripts}'
    )


def _header(storage: RDBStorage, menu: Mapping[str, str], current: str) -> str:
    """The menu: real links, the current page marked, and the switch between light and dark."""
    source = masked(storage.url)
    links = ""
    for name, path in menu.items():
        attributes = f'href="{path}" data-page'
        if name == current:
            attributes += " aria-current=page"
        links += f"<a {attributes}>{html.escape(_title(name))}</a>"
    return (
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header class="site"><nav aria-label="Pages">{links}</nav>'
        f'<span class="source" title="the study database">{html.escape(source)}</span>'
        '<button type="button" id="theme-switch">Dark</button></header>'
        '<p id="ended" role="alert"></p>'
    )


def _redirect(path: str) -> Application:
    """Redirect the bare address to this path; any other address is not found."""

    @Request.application
    def answer(request: Request) -> Response:
        if request.path.strip("/"):
            return Response("no such page\n", HTTPStatus.NOT_FOUND, mimetype="text/plain")
        return Response(status=HTTPStatus.FOUND, headers={"Location": path}, mimetype="text/plain")

    return answer
