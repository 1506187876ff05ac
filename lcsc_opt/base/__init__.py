"""Used by every room: errors, records, files, settings, progress."""

VERSION = "0.1.0"  # as in pyproject.toml
