"""The study database: written trial by trial, read as the history of a study."""
