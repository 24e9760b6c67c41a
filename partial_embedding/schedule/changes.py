"""What differs between two schedules, said so that a person can find it."""

from __future__ import annotations

from typing import Any

from partial_embedding.schedule.schedule import Schedule


def changes(before: Schedule, after: Schedule) -> list[str]:
    """List what is not the same in two schedules, in the order of their keys.

    Args:
        before: The schedule as it was, for example in a checkpoint.
        after: The schedule as it is now.

    Returns:
        One line for each key that was changed, added or removed; none where nothing was.

    Example:
        >>> before = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 3, "rows": "all"}])
        >>> after = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 5, "rows": "all"}])
        >>> changes(before, after)
        ['stages[1].epoch: 3 became 5']
    """
    lines: list[str] = []
    _compare("", before.to_config(), after.to_config(), lines)
    return lines


def _compare(place: str, before: Any, after: Any, lines: list[str]) -> None:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{place}.{key}" if place else key
            _compare_at(inner, before.get(key, _ABSENT), after.get(key, _ABSENT), lines)
    elif place == "stages":
        for i in range(max(len(before), len(after))):
            old, new = (stages[i] if i < len(stages) else _ABSENT for stages in (before, after))
            _compare_at(f"{place}[{i}]", old, new, lines)
    elif repr(before) != repr(after):  # 1 is a number of rows and 1.0 a share, though equal
        lines.append(f"{place}: {_shown(before)} became {_shown(after)}")


def _compare_at(place: str, before: Any, after: Any, lines: list[str]) -> None:
    if before is _ABSENT:
        lines.append(f"{place}: {_shown(after)} was added")
    elif after is _ABSENT:
        lines.append(f"{place}: {_shown(before)} was removed")
    else:
        _compare(place, before, after, lines)


_ABSENT = object()


def _shown(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"
