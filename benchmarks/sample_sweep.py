"""How single options change what is recovered: 32 images of the bundled sample, one seed.

    python benchmarks/sample_sweep.py --out results.json
    python benchmarks/sample_sweep.py --smoke

The counts in docs/choosing.md and docs/pitfalls.md are this script's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness

from jgia import AresOptions, AuditConfig, ClientConfig, DataConfig, ModelConfig, run_audit

SWEEP: dict[str, AuditConfig] = {
    "default": AuditConfig(),
    "signed": AuditConfig(ares=AresOptions(front_end="signed")),
    "direct": AuditConfig(ares=AresOptions(front_end="direct")),
    "random, raw pixels": AuditConfig(data=DataConfig(normalize=False)),
    "signed, raw pixels": AuditConfig(
        data=DataConfig(normalize=False), ares=AresOptions(front_end="signed")
    ),
    "direct, raw pixels": AuditConfig(
        data=DataConfig(normalize=False), ares=AresOptions(front_end="direct")
    ),
    "256 bins": AuditConfig(model=ModelConfig(fc_width=256)),
    "6 filters": AuditConfig(model=ModelConfig(widths=(6, 6))),
    "3 filters": AuditConfig(model=ModelConfig(widths=(3, 3))),
    "batch 8": AuditConfig(batch=8),
    "batch 64": AuditConfig(batch=64),
    "batch 128": AuditConfig(batch=128),
    "fedavg, one step": AuditConfig(client=ClientConfig(protocol="fedavg")),
    "fedavg, one step, momentum": AuditConfig(
        client=ClientConfig(protocol="fedavg", optimizer="momentum")
    ),
    "fedavg, one step, adam": AuditConfig(
        client=ClientConfig(protocol="fedavg", optimizer="adam", learning_rate=1e-3)
    ),
    "fedavg, one step, learning rate 1": AuditConfig(
        client=ClientConfig(protocol="fedavg", learning_rate=1.0)
    ),
    "fedavg, two epochs of minibatches of 8": AuditConfig(
        client=ClientConfig(protocol="fedavg", local_epochs=2, local_batch_size=8)
    ),
}


def main() -> None:
    """Run the sweep, print one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="two settings only")
    arguments = parser.parse_args()
    names = ["batch 8", "signed"] if arguments.smoke else list(SWEEP)
    rows: dict[str, Any] = {}
    for name in names:
        result = run_audit(SWEEP[name]).result
        scores = result["scores"]
        rows[name] = {
            "images": scores["num_true"],
            "at_40_db": round(scores["success_rate"]["40"]["rate"] * scores["num_true"]),
            "median_psnr": scores["psnr"]["median"],
            "expected": result["attack"]["expected_recovered"],
            "statuses": result["attack"]["status_counts"],
        }
        print(f"{name}: {rows[name]}", flush=True)
    if arguments.out:
        harness.write_json(arguments.out, {"machine": harness.machine(), "rows": rows})


if __name__ == "__main__":
    main()
