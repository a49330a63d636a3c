"""Peak memory of one stretch of a process."""

from __future__ import annotations

import re
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak() -> bool:
    """Start a new peak; whether the system can (Linux can)."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int | None:
    """Largest resident memory since :func:`reset_peak`, or of the whole process."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    except OSError:
        pass
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
