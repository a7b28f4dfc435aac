"""The checked configuration."""
