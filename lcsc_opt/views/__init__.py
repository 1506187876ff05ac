"""Read-only views of finished and running studies, as plain data and as figures. Imports no torch."""
