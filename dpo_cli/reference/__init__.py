"""Scoring once with the reference: a content-addressed store, and proof that it is right."""
