"""Which versions of the stored format are read: ours, and none that is newer."""

from __future__ import annotations

import optuna
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.store import SCHEMA, StoredStudy
from tests.commands import Typed
from tests.study_examples import write_study

NAME = "digits/LCSC/0"


def test_a_study_names_the_version_of_its_format(storage: RDBStorage) -> None:
    write_study(storage, NAME, [4.0])
    assert StoredStudy.open(storage, NAME).attributes["schema"] == SCHEMA


def test_a_newer_version_is_one_sentence(workplace: object, typed: Typed) -> None:
    url = "sqlite:///studies.db"
    optuna_storage = optuna.storages.RDBStorage(url)
    study = write_study(optuna_storage, NAME, [4.0])
    study.set_attribute("created_by", "lcsc_opt 9.1.0")
    study.set_attribute("schema", SCHEMA + 1)
    with pytest.raises(
        StudyStoreError, match=f"in schema {SCHEMA + 1}, and lcsc_opt .* reads schema {SCHEMA}; use that version"
    ):
        StoredStudy.open(optuna_storage, NAME)
    for command in (["list"], ["show", NAME], ["run", NAME], ["run", "digits", "--optimizer", "LCSC"]):
        said = typed.refused(*command)
        assert said.startswith(f"lcsc: {NAME}: was stored by lcsc_opt 9.1.0 in schema {SCHEMA + 1}, ")
