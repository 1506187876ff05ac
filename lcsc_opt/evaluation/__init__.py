"""Where candidates are evaluated: in this process, or in worker processes, whole or divided by images."""
