"""The URL of a study database, and how to show it without its passwords."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import urllib.parse
from pathlib import Path

import sqlalchemy as sa

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import expanded_path, from_here
from lcsc_opt.base.settings import excerpt
from lcsc_opt.base.streams import printable
from lcsc_opt.base.study_file import DEFAULT_STORAGE


def storage_url(option: str | Path | None, of_study_file: str | None = None) -> str:
    """The URL of the first database that is given, each by a URL or a file; else ``sqlite:///studies.db``.

    The order is ``option``, ``LCSC_STORAGE``, ``OPTUNA_STORAGE``, ``of_study_file``. A file is named by its whole path:
    where the process is later does not matter.

    Args:
        option: what the caller, or ``--storage``, says.
        of_study_file: what the study file has under ``storage``.

    Raises:
        StudySpecError: ``option`` is neither a URL nor a file.
        StudyStoreError: the system refuses the name of the file.
    """
    if option is not None and not (isinstance(option, (str, Path)) and str(option)):
        raise StudySpecError(f"storage: expected a file or the URL of a database, got {excerpt(option)}")
    choices = (option, os.environ.get("LCSC_STORAGE"), os.environ.get("OPTUNA_STORAGE"), of_study_file)
    return absolute_url(str(next((choice for choice in choices if choice), DEFAULT_STORAGE)))


def absolute_url(url: str) -> str:
    """The URL with the whole path of its file; one that cannot be parsed, or is of no file, as it is.

    A text without ``://`` is the name of a file, in which ``~`` is the home folder.

    Raises:
        StudyStoreError: the system refuses this name.
    """
    if "://" not in url:
        return url_of_file(expanded_path(url, error=StudyStoreError).absolute())
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # whoever opens it says what is wrong
        return url
    file = sqlite_file(parsed)
    if file is None or file.is_absolute():
        return url
    name = str(file.absolute())
    if parsed.drivername == "sqlite" and not parsed.query:
        return url_of_file(name)
    return parsed.set(database=name).render_as_string(hide_password=False)


def url_of_file(file: Path | str) -> str:
    """The URL of an SQLite database whose file has this name, as the installed SQLAlchemy reads it.

    Raises:
        StudyStoreError: no URL of it can: before version 2.1 a question mark ends a name.
    """
    name = str(file)
    url = f"sqlite:///{name}"
    if sa.make_url(url).database == name:  # also one that is not UTF-8, which nothing can quote
        return url
    url = f"sqlite:///{urllib.parse.quote(name)}"
    if sa.make_url(url).database == name:
        return url
    raise StudyStoreError(f"{file}: SQLAlchemy {sa.__version__} opens no database of this name; give it another one")


def is_there(url: str) -> bool:
    """Whether the database's file exists; a server is assumed to exist. Raises as :func:`parse_url`."""
    file = sqlite_file(parse_url(url))
    return file is None or file.exists()


def sqlite_file(url: sa.URL) -> Path | None:
    """The file of a database; ``None`` for a server, and in memory."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


def files_directory(url: str) -> Path:
    """The folder for what the studies of a database need and can make again: ``studies.files`` next to ``studies.db``.

    Of a server it is ``lcsc.files`` in the working directory. Raises as :func:`parse_url`.
    """
    file = sqlite_file(parse_url(url))
    if file is None:
        return Path("lcsc.files").absolute()
    return file.absolute().with_suffix(".files")


@functools.lru_cache
def parse_url(url: str) -> sa.URL:
    """The URL, parsed; one of PostgreSQL that names no driver has an installed one, if there is any.

    Raises:
        StudyStoreError: it cannot be parsed, names another kind of database, or a file whose name the system refuses.
            The message quotes no URL that may hold a password.
    """
    if _has_raw_at(url):
        raise StudyStoreError("storage: the password in the URL has an @ in it; write it as %40, and a % as %25")
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # the latter from a port that is no number
        raise StudyStoreError(
            f"storage: expected a database URL such as sqlite:///studies.db, got {masked(url)}"
        ) from None
    file = sqlite_file(parsed)
    if file is not None:
        expanded_path(file, error=StudyStoreError)
    elif parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise StudyStoreError(f"{masked(url)}: studies are in SQLite files and in PostgreSQL only")
    if parsed.drivername not in {"postgresql", "postgres"}:
        return parsed
    for driver in ("psycopg", "psycopg2"):
        if importlib.util.find_spec(driver) is not None:
            return parsed.set(drivername=f"postgresql+{driver}")
    return parsed.set(drivername="postgresql")  # opening it says that a driver is missing


def _has_raw_at(url: str) -> bool:
    """Whether more than one @ stands before the database's name: the first one then cuts a password in two."""
    password = re.match(r"[\w+]+://[^:/@]*:(.*)@", url, re.DOTALL)
    return password is not None and "@" in password[1]


def masked(url: str) -> str:
    """The URL with its passwords hidden, fit for messages and logs."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        return "(an unreadable URL)"
    if _has_raw_at(url):
        return "(an unreadable URL)"
    hidden = {name: "hidden" for name in parsed.query if _is_secret(name)}
    if parsed.password is None and not hidden:
        return _from_here(url, sqlite_file(parsed))  # rendering would percent-encode the file's name
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def _from_here(url: str, file: Path | None) -> str:
    """The URL with the path of its file from the working folder, if it is in that."""
    shown = url if file is None else url.replace(str(file), str(from_here(file)))
    return printable(shown)


def _is_secret(name: str) -> bool:
    return any(part in name.lower() for part in ("passw", "pwd", "secret", "token"))


def without_secrets(text: str, url: str) -> str:
    """A text that may quote the URL or its passwords, decoded or as written in it, with these hidden."""
    parsed = sa.make_url(url)
    values = [parsed.password, *(value for name, value in parsed.query.items() if _is_secret(name))]
    passwords = [str(password) for password in values if password]
    if not passwords:
        return text
    # whole URLs first: one whose password is replaced already would not be found
    secrets = [url, parsed.render_as_string(hide_password=False), *passwords]
    as_written = re.match(r"[\w+]+://[^:/@]*:([^@]*)@", url)
    if as_written is not None and as_written[1]:
        secrets.append(as_written[1])
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
