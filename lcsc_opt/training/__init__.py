"""Small recipes that train real models and leave real trajectories behind."""
