"""Used by every room: errors, records, files, settings, progress."""

VERSION = "0.2.0"
