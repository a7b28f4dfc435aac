"""The only part of config/ that knows Hydra: from files and overrides to one nested dictionary, problems collected."""
