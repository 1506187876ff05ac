"""One part of each kind for lcsc_opt."""
