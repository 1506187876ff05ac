"""Used by every room: errors, records, files, settings, progress."""

import time

VERSION = "0.4.0"
IMPORTED_AT = time.time()  # seconds since 1970; local modules that are newer may have been edited since their import
