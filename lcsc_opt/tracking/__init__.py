"""Curves of running studies in TensorBoard, W&B, Trackio or MLflow, and a call when a search ends."""
