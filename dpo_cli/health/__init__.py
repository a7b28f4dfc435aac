"""What a run's metrics say of how it goes, in plain words: pure, on the lines of metrics.jsonl alone."""
