"""One small pure function a file."""
