"""How long something takes, for people to read."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """As 12.3 s, 3 min 4 s or 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes, rest = _parts(seconds)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def as_clock(seconds: float) -> str:
    """As 12 s, 3:04 or 1:02:30: of a width that hardly changes while it is drawn again and again."""
    hours, minutes, rest = _parts(seconds)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _parts(seconds: float) -> tuple[int, int, int]:
    minutes, rest = divmod(round(seconds), 60)
    return *divmod(minutes, 60), rest
