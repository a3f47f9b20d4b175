"""Verifying plans by running them on this machine: loss, every gradient and an optimizer's update
as on one device, traffic as predicted, ranks that fit together; memory and time beside prediction.

`verify` and `verify_all` start the ranks (ranks.py is what each of them runs); `dry_run` counts a
step of a thousand ranks without any.
"""

from __future__ import annotations

from toolkit.plan.verify.dry import DryRun, dry_run
from toolkit.plan.verify.matrix import Row, verify_all
from toolkit.plan.verify.report import Report, TrafficRow, compare_traffic, to_json
from toolkit.plan.verify.start import verify

__all__ = [
    "DryRun",
    "Report",
    "Row",
    "TrafficRow",
    "compare_traffic",
    "dry_run",
    "to_json",
    "verify",
    "verify_all",
]
