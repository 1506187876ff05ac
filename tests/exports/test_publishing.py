"""An export at the hub: the hub's own client talks to a stand-in that answers what it asks."""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file

from lcsc_opt.base.paths import cache_directory
from lcsc_opt.exports import Recipe
from lcsc_opt.exports.publishing import push_to_hub
from lcsc_opt.exports.writing import Destination
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.model_studies import STUDY, write_model_study

CARD = "---\nlicense: openrail++\nbase_model: owner/pretrained\npipeline_tag: image-to-image\n---\nA training.\n"


class Hub(http.server.ThreadingHTTPServer):
    """What is in its repositories, by name and by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits = 0
        self.refuses = False


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        name = "/".join(self.path.split("/")[3:5])  # /api/models/owner/name/…
        if self.headers["Authorization"] != "Bearer hf_test" or self.server.refuses:
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif self.path == "/api/repos/create":
            assert "private" not in lines[0], "it is the owner's default"
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            status = 409 if name in self.server.files else 200
            self.server.files.setdefault(name, {})
            self.answer(status, {"url": f"{self.server.endpoint}/{name}"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in lines[0]["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": path, **how} for path in paths]})
        elif "/commit/" in self.path:
            values = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files[name] |= {value["path"]: base64.b64decode(value["content"]) for value in values}
            self.server.commits += 1
            self.answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/1", "commitOid": "1" * 40})
        else:
            assert self.path == "/api/validate-yaml"
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/owner/name/resolve/main/README.md" else 404, CARD.encode())

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lcsc_opt.cli import run

    folder = tmp_path_factory.mktemp("finished")
    file = write_model_study(folder, held_out={"images": 20, "top": 2}, budget={"evaluations": 12})
    assert run(["run", str(file), "--storage", f"sqlite:///{folder / 'studies.db'}"]) == 0
    return folder


@pytest.fixture
def typed(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> Typed:
    monkeypatch.setenv("LCSC_STORAGE", f"sqlite:///{finished / 'studies.db'}")
    return Typed(capsys)


def test_a_model_is_at_the_hub_with_a_card_that_says_how_it_was_made(typed: Typed, hub: Hub, finished: Path) -> None:
    (finished / "checkpoints" / "README.md").write_text(CARD)
    said = typed("export", STUDY, "-o", "best.safetensors", "--push-to-hub", "me/merged").err
    assert f"{hub.endpoint}/me/merged" in said
    files = hub.files["me/merged"]
    assert set(files) == {"README.md", "best.safetensors"}
    assert files["best.safetensors"] == Path("best.safetensors").read_bytes()
    recipe = typed.json("show", "best.safetensors")
    assert "groups" in recipe["held_out"]
    assert "groups" not in typed("show", "best.safetensors").out, "numbers of each group of noise fill a screen"
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model, card.data.tags) == (
        "openrail++",
        "owner/pretrained",
        ["lcsc", "merge"],
    )
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "me/merged"
    assert {result.task_type for result in results} == {"image-to-image"}
    shown = {(result.dataset_split, result.metric_name): result.metric_value for result in results}
    assert shown["search", "fid"] == shown["search", "loss"] == recipe["loss"]
    assert {metric: shown["held-out", metric] for metric in ("fid", "kid")} == recipe["held_out"]["metrics"]
    table = re.findall(r"^\| (\d+) \| (\S+) \| `(\w+)` \|$", card.text, re.MULTILINE)
    assert [int(step) for step, _, _ in table] == recipe["steps"]
    assert [float(value) for _, value, _ in table] == recipe["coefficients"]
    assert str(finished) not in files["README.md"].decode(), "no paths of this machine"
    typed("export", STUDY, "-o", "best.safetensors", "--trial", "3", "--overwrite", "--push-to-hub", "me/merged")
    assert hub.commits == 2
    assert "trial 3 of" in hub.files["me/merged"]["README.md"].decode()


def test_rows_have_columns_and_checkpoints_of_the_hub_are_the_base(
    typed: Typed, hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    typed("export", STUDY, "-o", "best.safetensors")
    recipe = Recipe.read(Path("best.safetensors"))
    one, other = recipe.coefficients, recipe.coefficients[::-1]
    in_rows = {"rows": {"conv": ("conv.weight",), "norm": ("norm.weight",)}, "coefficients": (one, other)}
    trajectory = Trajectory.open(finished / "run.trajectory")
    trajectory.sources = (str(cache_directory() / "hub" / "owner--name" / ("0" * 40) / "step-10"),)
    objective: Any = SimpleNamespace(trajectory=trajectory, sampler=None, images_per_evaluation=0)
    intervals = {"interval": [1.75, 2.25], "baseline_interval": [4, 5], "gain_interval": [2, 3]}
    row = {"metric": "kid", "sign": 1, "value": 2.0, "against": "EMA*", "baseline": 4.5, "gain": 2.5, **intervals}
    study: Any = SimpleNamespace(
        attributes={"held_out": {"loss": 2.5, "images": 2000, "rows": [row], "warning": "precision is lost"}}
    )
    to = Destination.of(Path("best.safetensors"), overwrite=True)
    push_to_hub("me/merged", to, study, objective, recipe.model_copy(update=in_rows))
    card = huggingface_hub.ModelCard(hub.files["me/merged"]["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/name", "merge")
    assert (card.data.license, card.data.pipeline_tag) == ("openrail++", "image-to-image")
    assert "| step | `conv` | `norm` | SHA-256 |" in card.text
    assert f"| {recipe.steps[0]} | {one[0]!r} | {other[0]!r} |" in card.text
    assert "| metric | searched | held-out noise [95 %] | EMA*, held-out noise [95 %] | gain [95 %] |" in card.text
    kid = r"^\| `kid` \|  \| \S+ \[1\.75, 2\.25\] \| 4\.5 \[4, 5\] \| \+2\.5 \[\+2, \+3\] \|$"
    assert re.search(kid, card.text, re.MULTILINE)
    assert "intervals for the noise of sampling 2,000 images" in card.text
    assert "precision is lost" in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["best.safetensors", "--push-to-hub", "a/b/c"], "expected OWNER/NAME"),
        (["recipe.json", "--push-to-hub", "me/merged"], "uploads a model"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_it_is_written(
    typed: Typed, hub: Hub, arguments: list[str], message: str
) -> None:
    assert message in typed.refused("export", STUDY, "-o", *arguments)
    assert not Path(arguments[0]).exists()


def test_the_export_stays_where_the_hub_refuses_or_is_gone(
    typed: Typed, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", STUDY, "-o", "best.safetensors", "--push-to-hub", "me/merged"]
    hub.refuses = True
    assert "best.safetensors is written, but me/merged at the hub was not (HfHubHTTPError" in typed.refused(*command)
    first = load_file("best.safetensors")
    hub.server_close()
    hub.shutdown()
    assert "later: hf upload me/merged best.safetensors" in typed.refused(*command, "--overwrite")
    assert first.keys() == load_file("best.safetensors").keys()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in to the hub" in typed.refused(*command, "--overwrite")
