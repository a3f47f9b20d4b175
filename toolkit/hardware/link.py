"""Link: what carries bytes between two devices, described by a latency and a bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import UsageError


@dataclass(frozen=True)
class Link:
    """A connection. `bandwidth` is the nominal B/s of one device, in one direction.

    A message of n bytes takes `latency_s + n / effective_bandwidth` (the alpha-beta model).
    `efficiency` is the part of the nominal rate that long messages reach. A `shared` link is one
    medium for all its users (a memory bus): its bandwidth is divided among them. For meshes and
    wired topologies the numbers are those of one wire.
    """

    name: str
    bandwidth: float
    latency_s: float
    efficiency: float = 1.0
    shared: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or self.latency_s < 0 or not 0 < self.efficiency <= 1:
            raise UsageError(
                f"link {self.name!r}: needs bandwidth > 0, latency_s >= 0 and 0 < efficiency <= 1, "
                f"not {self.bandwidth}, {self.latency_s}, {self.efficiency}"
            )

    @property
    def effective_bandwidth(self) -> float:
        """B/s that long messages reach.

        >>> Link("wire", 100e9, 1e-6, efficiency=0.8).effective_bandwidth
        80000000000.0
        """
        return self.bandwidth * self.efficiency

    def seconds(self, num_bytes: float, *, num_users: int = 1) -> float:
        """Return the time of one message while `num_users` devices use the link.

        >>> Link("bus", 10e9, 0.0, shared=True).seconds(10e9, num_users=2)
        2.0
        """
        rate = self.effective_bandwidth / (num_users if self.shared else 1)
        return self.latency_s + num_bytes / rate
