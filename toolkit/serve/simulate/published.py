"""What Nexus's authors report, as ratios, and the same ratios of a simulation beside them.

The paper prints curves and a few sentences, no tables (arXiv 2507.06608 v5, sections 6.2 to 6.4).
Its systems ran on GPUs; ours are simulated, and their kernels are all equally good. A ratio is
written so that above 1 is better for the system named first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """A ratio of two systems: `baseline` over `system` of a latency, the reverse of a throughput.

    `workloads` are those it was measured on; `key` and `statistic` name a figure of a run's
    summary, statistic None for a throughput, whose largest value over all rates counts.
    """

    what: str
    paper: str
    system: str
    baseline: str
    key: str
    statistic: str | None
    workloads: tuple[str, ...] = ("long", "arxiv", "mixed")
    num_devices: int = 1

    def ratios(self, runs: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
        """Return the least and the greatest ratio over the rates; None where a system is absent."""
        if self.statistic is None:
            ours, others = (
                max((float(run[self.key]) for run in runs if run["system"] == name), default=0.0)
                for name in (self.system, self.baseline)
            )
            return (ours / others, ours / others) if ours and others else None
        mine, theirs = (
            {run["rate"]: (run[self.key] or {}).get(self.statistic, 0.0) for run in runs
             if run["system"] == name}
            for name in (self.system, self.baseline)
        )  # fmt: skip
        found = [theirs[rate] / mine[rate] for rate in mine if mine[rate] and theirs.get(rate)]
        return (min(found), max(found)) if found else None


_NEXUS, _VLLM, _SGLANG = "split-spf", "chunked", "prefill-first"
_TTFT, _TBT, _TOKENS = "ttft_s", "tbt_s", "output_tokens_per_s"

CLAIMS: tuple[Claim, ...] = (
    Claim("TTFT, mean, over vLLM", "2 to 20", _NEXUS, _VLLM, _TTFT, "mean"),
    Claim("TTFT, mean, over SGLang", "up to 1.6", _NEXUS, _SGLANG, _TTFT, "mean"),
    Claim("TTFT, p95, over vLLM", "2 to 3", _NEXUS, _VLLM, _TTFT, "p95", ("long", "arxiv")),
    Claim("TTFT, p95, over vLLM", "below 1", _NEXUS, _VLLM, _TTFT, "p95", ("mixed",)),
    Claim("TBT, mean, over vLLM", "1.24 to 1.48", _NEXUS, _VLLM, _TBT, "mean"),
    Claim("throughput over vLLM", "1.5 to 1.8", _NEXUS, _VLLM, _TOKENS, None, ("long", "arxiv")),
    Claim(
        "throughput over SGLang", "1.18 to 1.27", _NEXUS, _SGLANG, _TOKENS, None, ("long", "arxiv")
    ),
    Claim("throughput over vLLM", "1.9", _NEXUS, _VLLM, _TOKENS, None, ("mixed",)),
    Claim("throughput over SGLang", "1.8", _NEXUS, _SGLANG, _TOKENS, None, ("mixed",)),
    Claim(
        "throughput over vLLM's P/D on two devices",
        *("1.4", _NEXUS, "two-devices", _TOKENS, None, ("mixed",)),
    ),
    Claim("throughput over vLLM", "2.2", _NEXUS, _VLLM, _TOKENS, None, ("mixed",), 2),
    Claim("throughput over SGLang", "2", _NEXUS, _SGLANG, _TOKENS, None, ("mixed",), 2),
    Claim("TTFT, mean, over vLLM", "2 to 3", _NEXUS, _VLLM, _TTFT, "mean", ("mixed",), 2),
    Claim("TBT, mean, over vLLM", "1.5 to 2", _NEXUS, _VLLM, _TBT, "mean", ("mixed",), 2),
    Claim(
        "ablation: dividing alone, TTFT", "0.77 (+30 %)", "split-fcfs", _VLLM, _TTFT, "mean",
        ("mixed",),
    ),
    Claim(
        "ablation: dividing alone, TBT", "1.16 (-14 %)", "split-fcfs", _VLLM, _TBT, "mean",
        ("mixed",),
    ),
    Claim(
        "ablation: shortest prompt first alone, TTFT", "up to 10 (-90 %)", "chunked-spf", _VLLM,
        _TTFT, "mean", ("mixed",),
    ),
    Claim(
        "ablation: both over shortest prompt first, TTFT", "1.30 (-23 %)", _NEXUS, "chunked-spf",
        _TTFT, "mean", ("mixed",),
    ),
    Claim(
        "ablation: both over shortest prompt first, TBT", "1.35 (-26 %)", _NEXUS, "chunked-spf",
        _TBT, "mean", ("mixed",),
    ),
)  # fmt: skip


def beside(body: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (what, the paper's, ours always divided as the paper, ours by `auto`) for a sweep.

    Only claims about the sweep's workload and number of devices, with both systems simulated. For
    the paper's own system the last column gives what `auto` reaches in its place.
    """
    rows, runs = [], body["runs"]
    for claim in CLAIMS:
        if body["workload"] not in claim.workloads or body["num_devices"] != claim.num_devices:
            continue
        found = claim.ratios(runs)
        if found is None:
            continue
        auto = None
        if claim.system == _NEXUS:
            auto = _replaced(claim, "auto").ratios(runs)
        rows.append((claim.what, claim.paper, _range(found), _range(auto)))
    return rows


def _replaced(claim: Claim, system: str) -> Claim:
    return Claim(
        claim.what, claim.paper, system, claim.baseline, claim.key, claim.statistic,
        claim.workloads, claim.num_devices,
    )  # fmt: skip


def _range(found: tuple[float, float] | None) -> str:
    if found is None:
        return "-"
    low, high = (f"{value:.2f}" for value in found)
    return low if low == high else f"{low} to {high}"
