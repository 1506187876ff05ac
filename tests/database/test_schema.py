"""Which versions of the stored format are read: ours, and none that is newer."""

from __future__ import annotations

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import SCHEMA
from tests.commands import Typed
from tests.study_examples import write_study

NAME = "digits/LCSC/0"


def test_a_newer_version_is_one_sentence(workplace: object, typed: Typed) -> None:
    study = write_study(open_storage("sqlite:///studies.db", write=True), NAME, [4.0])
    study.set_attribute("created_by", "lcsc_opt 9.1.0")
    study.set_attribute("schema", SCHEMA + 1)
    for command in (["list"], ["show", NAME], ["run", NAME], ["run", "digits", "--optimizer", "LCSC"]):
        said = typed.refused(*command)
        assert said.startswith(f"lcsc: {NAME}: was stored by lcsc_opt 9.1.0 in schema {SCHEMA + 1}, ")
        assert f"reads schema {SCHEMA}; use that version" in said
