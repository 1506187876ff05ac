from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from optuna.artifacts import FileSystemArtifactStore

from lcsc_opt.catalog import find, load_file
from lcsc_opt.dashboard_server import serve
from lcsc_opt.database import open_storage
from lcsc_opt.errors import StudyStoreError
from lcsc_opt.records import Candidate, Evaluation
from lcsc_opt.results import artifact_directory
from lcsc_opt.study_store import StoredStudy

pytestmark = pytest.mark.filterwarnings("ignore")  # optuna-dashboard's own


@pytest.fixture
def study(url: str) -> StoredStudy:
    study = StoredStudy.open_or_create(open_storage(url, write=True), "digits/LCSC/0", {"steps": [1, 2]})
    for loss in (3.0, 2.0):
        study.finish(study.add_candidate(Candidate(np.array([0.5, 0.5]))), Evaluation(loss), tell_index=0)
    return study


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(address: str) -> bytes:
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return bytes(answer.read())
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_the_dashboard_serves_studies_and_artifacts_on_loopback(study: StoredStudy, url: str, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"\x89PNG picture")
    folder = artifact_directory(url)
    folder.mkdir()
    from lcsc_opt.study_store import TrialKey

    trial = study.trials()[1]
    study.attach(TrialKey.of(trial), FileSystemArtifactStore(folder), picture)
    port = free_port()
    serving = threading.Thread(target=serve, args=(open_storage(url, write=False),), kwargs={"port": port}, daemon=True)
    serving.start()
    home = f"http://127.0.0.1:{port}"
    assert b"<html" in get(f"{home}/dashboard/").lower()
    (summary,) = json.loads(get(f"{home}/api/studies"))["study_summaries"]
    assert summary["study_name"] == "digits/LCSC/0"
    shown = json.loads(get(f"{home}/api/studies/{summary['study_id']}?after=0"))
    (artifact,) = shown["trials"][1]["artifacts"]
    path = f"{home}/artifacts/{summary['study_id']}/{trial._trial_id}/{artifact['artifact_id']}"
    assert get(path) == b"\x89PNG picture"
    importances = json.loads(get(f"{home}/api/studies/{summary['study_id']}/param_importances"))
    assert importances  # the parameters that stand for the coefficients keep this page alive


def test_a_taken_port_is_one_line(study: StoredStudy, url: str) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StudyStoreError, match=f"port {port}: .*give another --port"):
            serve(open_storage(url, write=False), port=port)


def test_every_dashboard_builds(study: StoredStudy, url: str) -> None:
    assert callable(load_file(find("dashboards", "optuna")).build(open_storage(url, write=False)))
