"""The names of all studies in the database. The recipe "Add a page to the dashboard" of CONTRIBUTING.md."""

from __future__ import annotations

import dash
from dash import html
from optuna.storages import RDBStorage

from lcsc_opt.views.dashboard.parts import shared_reader


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    reader = shared_reader(storage)
    app = dash.Dash(__name__)
    app.layout = lambda: html.Ul([html.Li(name) for name in reader.names()])
    return app
