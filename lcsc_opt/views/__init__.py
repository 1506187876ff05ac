"""A study's history as people look at it: curves, rankings, figures, a report, the dashboard. Reads only; no torch."""
