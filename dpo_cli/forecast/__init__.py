"""What a run will need of memory, disk and time: arithmetic on a model's config, without torch."""
