"""Parameters that a rank gathers and reduces together, as the search prices them: what
predict.units says, in seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from toolkit.ir.graph import Tensor
from toolkit.plan.plan import How, Offload
from toolkit.plan.predict.units import padded_elements, padded_rows
from toolkit.plan.search.site import Site


class Unit(NamedTuple):
    """Bytes are those of a rank at one position."""

    item: int  # in whose backward it is reduced
    is_root: bool
    whole: int  # bytes, padded as the way needs it
    gather_s: float
    reduce_s: float
    after_s: float
    held: int
    gradients: int
    share: int  # of the gradients, once reduced
    reserved: int
    updated: int
    host: int = 0  # parameters kept on the host
    down_s: float = 0.0  # copies around an update there,
    up_s: float = 0.0
    drop_s: float = 0.0  # after each reduction,
    fetch_s: float = 0.0  # and before each gather


def on_device(
    site: Site, item: int, is_root: bool, parts: Sequence[Tensor], position: int, zero: How
) -> Unit:
    """Return a unit that offloads nothing."""
    n = site.mesh.data
    apart = site.mesh.replica > 1
    trained = [part for part in parts if part.requires_grad]
    whole = sum(part.num_bytes for part in parts)
    gradients = sum(part.num_bytes for part in trained)
    data_s = site.data_s

    def scatter_s(size: int, *, meet: bool = False) -> float:
        """Of what is scattered inside a group, the groups add up their shares."""
        within = data_s("reduce_scatter", size, position, meet=meet)
        return within + (data_s("all_reduce", size // n, position, "replica") if apart else 0.0)

    if n == 1:
        return Unit(item, is_root, 0, 0.0, 0.0, 0.0, whole, gradients, gradients, 0, gradients)
    if zero == "shard":
        padded = sum(padded_rows(part, n) for part in parts)
        reached = sum(padded_rows(part, n) for part in trained)
        return Unit(
            item, is_root, padded, data_s("all_gather", padded, position),
            scatter_s(reached) if reached else 0.0, 0.0,
            padded // n, reached, reached // n, 0, reached // n,
        )  # fmt: skip
    if zero == "replicate":
        reduce_s = data_s("all_reduce", gradients, position, meet=True) if gradients else 0.0
        kept = (gradients,) * 4
        return Unit(item, is_root, 0, 0.0, reduce_s, 0.0, whole, *kept)
    flat = padded_elements(gradients, parts[0].dtype, n)
    share = flat // n
    meet = zero == "shard_optimizer"
    return Unit(
        item, is_root, 0, 0.0, scatter_s(flat, meet=meet),
        data_s("all_gather", flat, position, meet=meet), whole, gradients, share,
        share if zero == "shard_gradients" else share + flat, share,
    )  # fmt: skip


def on_host(unit: Unit, site: Site, position: int, offload: Offload) -> Unit:
    """Return the unit with what it offloads, as predict.units has it."""
    copy_s = site.copy_s
    if offload == "optimizer":
        size = unit.updated
        down_s, up_s = copy_s("down", size, position), copy_s("up", size, position)
        return unit._replace(down_s=down_s, up_s=up_s, host=size)
    if offload == "none" or site.costs.is_cpu:
        return unit
    share = unit.held
    return unit._replace(
        whole=unit.whole + share, held=0, share=0, host=share,
        fetch_s=copy_s("up", share, position), drop_s=copy_s("down", unit.share, position),
    )  # fmt: skip


def after_s(units: Sequence[Unit]) -> float:
    """Return seconds from the update on: units come up from a host, and are gathered, in turn."""
    up_s = gathered_s = 0.0
    for unit in units:
        up_s += unit.up_s
        gathered_s = max(gathered_s, up_s) + unit.after_s
    return max(up_s, gathered_s)
