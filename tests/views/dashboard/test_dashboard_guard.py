from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from werkzeug.test import Client

from lcsc_opt.views.dashboard.server import guarded
from tests.dashboard_site import HOST

CALLBACK = "/lcsc/compare/_dash-update-component"


def echo(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Access-Control-Allow-Origin", "*")])
    return [f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}".encode()]


def failing(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    message = "postgresql://me:secret@host\nand more"
    raise RuntimeError(message)


def ask(path: str = "/", method: str = "GET", *, site: Any = echo, **headers: str) -> Any:
    named = {"Host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Client(guarded(site), use_cookies=False).open(path, method=method, headers=named)


HERE = ["127.0.0.1:8080", "localhost", "localhost:9999", "[::1]:8080"]
ELSEWHERE = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "[", "a@b"]
ORIGINS = ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8080", ""]


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        *(("/", "GET", {"Host": name}, 200) for name in HERE),
        *(("/", "GET", {"Host": name}, 403) for name in ELSEWHERE),
        *((CALLBACK, method, {"Origin": name}, 403) for name in ORIGINS for method in ("GET", "POST")),
        (CALLBACK, "POST", {"Origin": f"http://{HOST}", "Sec_Fetch_Site": "same-origin"}, 200),
        (CALLBACK, "POST", {"Sec_Fetch_Site": "same-origin"}, 200),  # through a proxy that leaves the Origin out
        ("/", "GET", {"Sec_Fetch_Site": "none", "Sec_Fetch_Mode": "navigate"}, 200),
        ("/", "GET", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
        ("/", "GET", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        (CALLBACK, "POST", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 403),
        (CALLBACK, "POST", {"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_only_this_machine_is_served_and_other_sites_may_only_link_here(
    path: str, method: str, headers: dict[str, Any], status: int
) -> None:
    assert ask(path, method, **headers).status_code == status


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/api/studies", "/lcsc/compare/file", "/_dash-update-component"])
def test_only_reads_and_callbacks_pass(path: str, method: str) -> None:
    answer = ask(path, method)
    assert answer.status_code == 403
    assert "only reads" in answer.text


def test_answers_are_kept_from_other_sites() -> None:
    headers = ask().headers
    assert "Access-Control-Allow-Origin" not in headers
    wanted = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "SAMEORIGIN"}
    assert dict(headers).items() >= {**wanted, "Cross-Origin-Resource-Policy": "same-origin"}.items()
    assert ask(Host="evil.example").headers["X-Content-Type-Options"] == "nosniff"


def test_an_error_is_one_line_on_the_terminal_and_nothing_in_the_browser(capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask("/page", site=failing)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert capsys.readouterr().err == "lcsc: dashboard: /page: RuntimeError: postgresql://me:secret@host\n"
