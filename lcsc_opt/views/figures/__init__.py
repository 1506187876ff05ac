"""Figures of plotly, from plain data."""
