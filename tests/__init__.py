"""Tests, room by room as the package; helpers are imported as ``tests.room.module``."""
