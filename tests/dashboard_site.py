"""The dashboard without a network: requests and callbacks as a browser sends them, and small studies to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from optuna.storages import RDBStorage
from werkzeug.test import Client, TestResponse

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.dashboard.server import application
from tests import study_examples
from tests.history_examples import measured

HOST = "127.0.0.1:8080"


def written(url: str) -> RDBStorage:
    """The database to write to; opened each time, since the paths of ended tests are used again."""
    return open_storage(url, write=True)


def write_study(
    url: str,
    name: str,
    losses: Sequence[float | None] = (3.0, 2.0),
    *,
    held_out: float | None = None,
    ended: bool = True,
) -> StoredStudy:
    """A study with a trial for each loss; ``None`` stands for one that failed, ``held_out`` is of the best one."""
    found = None
    if held_out is not None:
        best = min((loss, number) for number, loss in enumerate(losses) if loss is not None)[1]
        found = measured(held_out, trial=best)
    return study_examples.write_study(written(url), name, losses, held_out=found, ended=ended)


class Site:
    """The whole site over one database."""

    def __init__(self, url: str) -> None:
        self.application = application(open_storage(url, write=False))
        self._client = Client(self.application)

    def request(self, path: str, method: str = "GET", *, host: str = HOST, **options: Any) -> TestResponse:
        """An answer, redirects not followed."""
        headers = {"Host": host, "Accept-Encoding": "gzip", **options.pop("headers", {})}
        return self._client.open(path, method=method, headers=headers, **options)

    def get(self, path: str) -> str:
        """The text of an answer that must be good."""
        answer = self.request(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def call(self, page: str, output: str, triggered: str | None = None, **values: Any) -> dict[str, Any]:
        """What a callback of a page changes: component → property → value; ``values`` by component.

        The callback is the one with this output; of a value that is not given the browser knows nothing.
        """
        known = json.loads(self.get(f"/lcsc/{page}/_dash-dependencies"))
        (wanted,) = [one for one in known if output in one["output"] and one["clientside_function"] is None]
        names = [part.rsplit(".", 1) for part in wanted["output"].strip(".").split("...")]
        outputs = [{"id": name, "property": value} for name, value in names]
        body = {
            "output": wanted["output"],
            "outputs": outputs if wanted["output"].startswith("..") else outputs[0],
            "inputs": [{**one, "value": values.get(one["id"])} for one in wanted["inputs"]],
            "state": [{**one, "value": values.get(one["id"])} for one in wanted["state"]],
            "changedPropIds": [f"{one['id']}.{one['property']}" for one in wanted["inputs"] if one["id"] == triggered],
        }
        answer = self.request(f"/lcsc/{page}/_dash-update-component", "POST", json=body)
        if answer.status_code == 204:
            return {}
        assert answer.status_code == 200, answer.text
        found = json.loads(answer.text)
        return {**found.get("sideUpdate", {}), **found.get("response", {})}
