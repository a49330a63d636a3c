"""Check how long it takes to start: ``import jgia`` and ``jgia --help``, the best of five."""

import subprocess
import sys
import time

LIMITS = {
    "import jgia": ([sys.executable, "-c", "import jgia"], 1.0),
    "jgia --help": (["jgia", "--help"], 1.5),
}

late = []
for name, (command, limit) in LIMITS.items():
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    print(f"{name}: {min(times):.3f} s (limit {limit} s)")
    if min(times) >= limit:
        late.append(name)
if late:
    sys.exit(f"too slow: {', '.join(late)}")
