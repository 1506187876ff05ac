"""Views of a study's history for people: curves, rankings, figures, a report, the dashboard. Reads only; no torch."""
