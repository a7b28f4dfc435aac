"""Order, micro-batch plan and the packed layout: pure."""
