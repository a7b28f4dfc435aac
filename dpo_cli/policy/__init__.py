"""The model, its attention over packed rows, and the log-prob head."""
