"""The Jacobian of a LeNet's gradient by torch.func, in a process of its own.

Runs under the peer's interpreter (``--peer-python`` of ``risk_cost.py``) and imports nothing of
jgia: weights and image come from a file, results go to standard output as one JSON line.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jacrev


def main() -> None:
    """``python risk_cost_peer.py FILE jacfwd|jacrev THREADS``."""
    path, mode, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with np.load(path) as arrays:
        held = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    x, y = held.pop("x"), held.pop("y")

    def loss(params: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        z = image[None]
        for i, stride in ((1, 2), (2, 2), (3, 1)):
            z = F.conv2d(z, params[f"w{i}"], params[f"b{i}"], stride=stride, padding=2).sigmoid()
        z = z.permute(0, 2, 3, 1).reshape(1, -1)
        return F.cross_entropy(z @ params["w4"] + params["b4"], y)

    def release(image: torch.Tensor) -> torch.Tensor:
        found = grad(loss)(held, image)
        return torch.cat([found[name].reshape(-1) for name in sorted(found)])

    start = time.perf_counter()
    if mode == "jacfwd":
        jacobian = jacfwd(release, chunk_size=256)(x)
    else:
        jacobian = jacrev(release, chunk_size=256)(x)
    jacobian = jacobian.reshape(jacobian.shape[0], -1)
    formed = time.perf_counter() - start
    sigma = torch.linalg.svdvals(jacobian)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "seconds": seconds,
                "jacobian_seconds": formed,
                "peak_bytes": peak * 1024,
                "sigma": sigma.tolist(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
