"""One run, from checked config to final model."""
