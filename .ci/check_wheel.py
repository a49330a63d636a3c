"""Check what a wheel would put into site-packages, and that data files and licenses are in it."""

import sys
import zipfile

NEEDED = (
    "jgia/py.typed",
    "jgia/report/report.css",
    "jgia/data/_sample/PROVENANCE.md",
    "jgia/data/_sample/sample_32.png",
    "jgia_kernels/py.typed",
)

names = zipfile.ZipFile(sys.argv[1]).namelist()
top = {name.split("/")[0] for name in names}
packages = {name for name in top if not name.endswith(".dist-info")}
if packages != {"jgia", "jgia_kernels"} or len(top) != 3:
    sys.exit(f"the wheel must install jgia and jgia_kernels alone, it installs {sorted(top)}")
missing = [name for name in NEEDED if name not in names]
missing += [
    name
    for name in ("LICENSE", "NOTICE")
    if not any(n.endswith(f"/licenses/{name}") for n in names)
]
if missing:
    sys.exit(f"the wheel lacks {', '.join(missing)}")
print(f"{len(names)} files; top-level names: {', '.join(sorted(top))}")
