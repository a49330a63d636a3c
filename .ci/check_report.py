"""Check a report folder: four files that are not empty, and a result that fits the schema."""

import json
import sys
from pathlib import Path

from jgia.report import validate_result

folder = Path(sys.argv[1])
for name in ("report.html", "result.json", "reconstructions.npz", "grid.png"):
    size = (folder / name).stat().st_size
    if not size:
        sys.exit(f"{folder / name} is empty")
    print(f"{name}: {size} bytes")
result = json.loads((folder / "result.json").read_text("utf-8"))
validate_result(result)
print(f"result.json fits schema {result['version']}")
