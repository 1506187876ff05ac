"""What every room uses: errors, records, files, settings, progress."""

VERSION = "0.1.0"  # as in pyproject.toml
