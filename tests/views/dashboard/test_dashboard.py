from __future__ import annotations

import contextlib
import socket
import sqlite3
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import sqlalchemy as sa
from werkzeug.test import Client

from lcsc_opt.base.catalog import entries
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.views.dashboard.pages import site as site_over
from lcsc_opt.views.dashboard.parts import shared_reader
from lcsc_opt.views.dashboard.server import application, serve
from tests.browser import served
from tests.commands import Typed
from tests.dashboard_site import Site, write_study
from tests.database_servers import free_port

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site that is only asked."""
    url = f"sqlite:///{tmp_path_factory.mktemp('finished') / 'studies.db'}"
    write_study(url, "digits/LCSC/0", held_out=1.5)
    return Site(url)


def test_it_serves_on_loopback(url: str) -> None:
    write_study(url, "digits/LCSC/0", held_out=1.5)
    home = served(url)
    assert home.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(home, timeout=30) as answer:
        assert answer.url.endswith("/lcsc/compare")
        assert answer.headers["Server"].strip() == "lcsc"
        assert b"<title>Compare" in answer.read()
    asked = urllib.request.Request(home, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked, timeout=30)


def test_every_page_of_the_catalog_is_served_and_linked(site: Site) -> None:
    assert site.request("/").headers["Location"].endswith("/lcsc/")
    assert site.request("/lcsc/").headers["Location"] == "/lcsc/compare"
    pages = sorted(entries("dashboards"))
    assert {"compare", "study", "images"} <= set(pages)
    for page in pages:
        answer = site.request(f"/lcsc/{page}")
        text, policy = answer.text, answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "<noscript><p>This page needs JavaScript." in text
        assert "unsafe" not in policy.partition("script-src")[2]
        assert "http" not in policy
        assert all(f'href="/lcsc/{name}"' in text for name in pages)
        assert "aria-current=page" in text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/lcsc/_static/../__init__.py",
        "/lcsc/_static/%2e%2e/%2e%2e/cli/output.py",
        "/lcsc/_static//etc/passwd",
        "/lcsc/nothing",
        "/lcsc/compare/assets/../compare.py",
    ],
)
def test_paths_do_not_leave_their_folder(path: str, site: Site) -> None:
    answer = site.request(path)
    assert answer.status_code in {400, 403, 404}
    assert b"SQLite format" not in answer.data
    assert b"import" not in answer.data


def test_the_database_itself_refuses_writes(any_url: str) -> None:
    write_study(any_url, "digits/LCSC/0")
    storage = open_storage(any_url, write=False)
    application(storage)
    with (
        storage.engine.connect() as connection,
        pytest.raises((sa.exc.DBAPIError, ConnectionError), match=r"(?i)read-?only"),
    ):
        connection.execute(sa.text("delete from trials"))
    shared_reader(storage).read("digits")
    assert shared_reader(storage) is shared_reader(storage)


def test_a_page_of_ones_own_is_in_the_menu(url: str, workplace: Path) -> None:
    write_study(url, "digits/LCSC/0")
    (workplace / "dashboards").mkdir()
    (workplace / "dashboards" / "my_page.py").write_text(
        "import dash\n"
        "def build(storage):\n"
        "    app = dash.Dash(__name__)\n"
        "    app.layout = dash.html.P('mine', id='mine')\n"
        "    return app\n"
    )
    site = Site(url)
    text = site.get("/lcsc/my_page")
    assert all(part in text for part in ("My page", 'href="/lcsc/compare"', "/lcsc/my_page/_dash-component-suites/"))
    assert "mine" in site.get("/lcsc/my_page/_dash-layout")
    assert 'href="/lcsc/my_page"' in site.get("/lcsc/compare")


def test_a_password_never_reaches_a_page(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    write_study(url, "digits/LCSC/0")
    storage = open_storage(url, write=False)
    storage.url = "postgresql://me:secret@host/studies"
    client = Client(site_over(storage))
    for path in ("/lcsc/compare", "/lcsc/compare/_dash-layout", "/lcsc/images", "/dashboard/", "/api/meta"):
        text = client.get(path, headers={"Host": "localhost"}).text
        assert "secret" not in text
    assert "postgresql://me:***@host/studies" in client.get("/lcsc/compare").text


def test_an_address_that_cannot_be_listened_on_is_one_line(url: str) -> None:
    write_study(url, "digits/LCSC/0")
    storage = open_storage(url, write=False)
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StudyStoreError, match=f"port {port} of 127.0.0.1: .*give another --port"):
            serve(storage, port=port)


def test_the_command_prints_the_address_and_refuses_a_database_without_studies(
    workplace: Path, url: str, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    write_study(url, "digits/LCSC/0")
    monkeypatch.setattr("werkzeug.serving.BaseWSGIServer.serve_forever", lambda self: None)
    command = ["dashboard", "--storage", url, "--port", (port := str(free_port()))]
    assert f"http://127.0.0.1:{port}/lcsc/ shows" in typed(*command).err
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        connection.executescript("CREATE TABLE notes (text)")
    assert "holds no studies" in typed.refused("dashboard")
