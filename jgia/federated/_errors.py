"""The error of the exchange of updates, and how names from a file are printed in it."""

from __future__ import annotations

from collections.abc import Iterable


class UpdateError(ValueError):
    """A file or mapping that is not a usable update of this model. The message is one line."""


def shown(names: Iterable[str], limit: int = 5) -> str:
    r"""Names for a one-line message: quoted, escaped, shortened, at most ``limit`` of them.

    >>> shown(["b\n", "a"])
    "'a', 'b\\n'"
    >>> shown([])
    'nothing'
    """
    ordered = sorted(names)
    parts = [ascii(name if len(name) <= 60 else name[:57] + "...") for name in ordered[:limit]]
    if len(ordered) > limit:
        parts.append(f"and {len(ordered) - limit} more")
    return ", ".join(parts) or "nothing"
