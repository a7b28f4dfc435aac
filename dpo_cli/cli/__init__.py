"""Commands: they parse, check, hand over, and turn errors into exit codes; nothing else knows the command line."""
