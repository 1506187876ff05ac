from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from werkzeug.test import Client

from lcsc_opt.views.dashboard.server import Guard
from tests.dashboard_site import HOST, Site, write_study

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # optuna-dashboard's own
TOKEN = "correct-horse"


def echo(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Access-Control-Allow-Origin", "*")])
    return [f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}".encode()]


def failing(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    message = "postgresql://me:secret@host\nand more"
    raise RuntimeError(message)


def ask(path: str = "/", method: str = "GET", *, guard: Guard | None = None, cookie: str = "", **headers: str) -> Any:
    guard = guard or Guard(echo, any_host=False, token=None, cookie="lcsc_token")
    named = {"Host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    if cookie:
        named["Cookie"] = cookie
    return Client(guard, use_cookies=False).open(path, method=method, headers=named)


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "localhost:9999", "[::1]:8080"])
def test_names_of_this_machine_are_served(host: str) -> None:
    assert ask(Host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "[", "a@b"]
)
def test_another_host_is_refused(host: str) -> None:
    assert ask(Host=host).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8080", ""]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_requests_from_another_origin_are_refused(origin: str, method: str) -> None:
    assert ask("/lcsc/compare/_dash-update-component", method, Origin=origin).status_code == 403


def test_our_own_pages_may_ask() -> None:
    path = "/lcsc/compare/_dash-update-component"
    assert ask(path, "POST", Origin=f"http://{HOST}", Sec_Fetch_Site="same-origin").status_code == 200
    assert ask("/", Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate").status_code == 200


def test_other_sites_may_link_here_but_neither_embed_nor_post() -> None:
    assert ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status_code == 200
    assert ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status_code == 403
    path = "/lcsc/compare/_dash-update-component"
    assert ask(path, "POST", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status_code == 403
    assert ask(path, "POST", Sec_Fetch_Site="same-site").status_code == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/api/studies", "/lcsc/compare/file", "/_dash-update-component"])
def test_only_reads_and_callbacks_pass(path: str, method: str) -> None:
    answer = ask(path, method)
    assert answer.status_code == 403
    assert "only reads" in answer.text


def test_answers_are_kept_from_other_sites() -> None:
    answer = ask()
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert ask(Host="evil.example").headers["X-Content-Type-Options"] == "nosniff"


def test_an_error_is_one_line_on_the_terminal_and_nothing_in_the_browser(capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask("/page", guard=Guard(failing, any_host=False, token=None, cookie="c"))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert capsys.readouterr().err == "lcsc: dashboard: /page: RuntimeError: postgresql://me:secret@host\n"


@pytest.fixture
def guarded() -> Guard:
    return Guard(echo, any_host=True, token=TOKEN, cookie="lcsc_token_8080")


def test_without_the_token_nothing_is_served(guarded: Guard) -> None:
    for path in ("/", "/lcsc/_static/lcsc.js", "/?token=", "/?token=wrong", f"/?token={TOKEN}x", f"/?tokens={TOKEN}"):
        answer = ask(path, guard=guarded)
        assert answer.status_code == 403
        assert "Set-Cookie" not in answer.headers
    assert ask(guard=guarded, cookie="lcsc_token_8080=wrong").status_code == 403
    assert ask(guard=guarded, cookie=f"lcsc_token_9999={TOKEN}").status_code == 403
    assert ask(guard=guarded, cookie="lcsc_token_8080=\xfc").status_code == 403


def test_the_token_is_exchanged_for_a_cookie_that_scripts_cannot_read(guarded: Guard) -> None:
    answer = ask(f"/lcsc/compare?axis=images&token={TOKEN}&scale=x", guard=guarded, Host="gpu7:8080")
    assert answer.status_code == 303
    assert answer.headers["Location"] == "/lcsc/compare?axis=images&scale=x"
    cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(attributes)
    assert ask("/lcsc/compare", guard=guarded, cookie=cookie, Host="gpu7:8080").status_code == 200


@pytest.mark.parametrize(
    "path", [f"//evil.example/?token={TOKEN}", f"/%5Cevil.example?token={TOKEN}", f"/%0d%0aX: y?token={TOKEN}"]
)
def test_the_token_leads_nowhere_else(path: str, guarded: Guard) -> None:
    location = ask(path, guard=guarded).headers["Location"]
    assert location.startswith("/")
    assert not location.startswith(("//", "/\\"))
    assert "\n" not in location


def test_with_a_token_the_origin_is_checked_as_well(guarded: Guard) -> None:
    cookie = f"lcsc_token_8080={TOKEN}"
    path = "/lcsc/compare/_dash-update-component"
    assert (
        ask(path, "POST", guard=guarded, cookie=cookie, Host="gpu7:8080", Origin="http://gpu7:8080").status_code == 200
    )
    assert ask(path, "POST", guard=guarded, cookie=cookie, Host="gpu7:8080", Origin="http://evil").status_code == 403


def test_a_name_of_another_machine_needs_a_token_to_be_accepted(url: str) -> None:
    write_study(url, "digits/LCSC/0")
    assert Site(url, host="0.0.0.0").request("/lcsc/", host="gpu7:8080").status_code == 403
    site = Site(url, host="0.0.0.0", token=TOKEN)
    assert site.request("/lcsc/", host="gpu7:8080").status_code == 403
    assert site.request(f"/lcsc/?token={TOKEN}", host="gpu7:8080").status_code == 303
