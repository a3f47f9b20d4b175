"""How the gradients of a position's stages meet over the replica and data axes, unit by unit.

Each stage reduces its part of every unit: those parameters that no later stage of the position
uses (in a V, an embedding that is also the head lies in two of its stages). Units are replicated,
or sharded for the update (ZeRO-1). A unit is reduced in the stage's last backward, as soon as it is
complete; where weights' gradients are put off (deferred.py), at the end of the step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from toolkit.plan.lower import groups
from toolkit.plan.lower.data import Buckets, Gradients, Named
from toolkit.plan.lower.zero import Zero
from toolkit.plan.plan import Plan


class Reductions:
    """Those of one position; none where there is one replica.

    `uses` are the parameters by stage, in the order in which stages run their last backward.
    `elsewhere` names those that other positions hold too: they are summed over those afterwards,
    whole, and so are replicated always. Stages in `put_off` have backwards in two halves.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: DeviceMesh,
        uses: Mapping[int, Named],
        elsewhere: Collection[str],
        put_off: Collection[int],
    ) -> None:
        self._put_off = frozenset(put_off)
        self._by_stage: dict[int, list[Gradients]] = {}
        self._zeros: list[Zero] = []
        if plan.num_replicas == 1:
            return
        both = groups.along(plan, ("replica", "data"), mesh)
        last = {name: stage for stage, held in uses.items() for name in held}
        replicated, sharded = plan.placed("replicate"), plan.placed("shard_optimizer")
        for stage, held in uses.items():
            own = {name: value for name, value in held.items() if last[name] == stage}
            whole = {name: value for name, value in own.items() if name in elsewhere}
            found: list[Gradients] = []
            if sharded:
                rest = {name: value for name, value in own.items() if name not in elsewhere}
                zero = Zero(
                    rest,
                    sharded,
                    mesh.get_group("data"),
                    mesh.get_group("replica") if plan.size("replica") > 1 else None,
                    shard_gradients=False,
                    put_off=stage in self._put_off,
                )
                self._zeros.append(zero)
                found += [zero, Buckets(whole, sharded, both, put_off=stage in self._put_off)]
            else:
                found.append(Buckets(own, replicated, both, put_off=stage in self._put_off))
            self._by_stage[stage] = found

    def __bool__(self) -> bool:
        return bool(self._by_stage)

    def __iter__(self) -> Iterator[Gradients]:
        for found in self._by_stage.values():
            yield from found

    def zero(self) -> None:
        for found in self:
            found.zero()

    def arm(self, stage: int) -> None:
        """The last backward of `stage` follows."""
        # What is put off comes after the hooks of backward, which would reduce without it.
        if stage not in self._put_off:
            for found in self._by_stage.get(stage, ()):
                found.arm(last=True)

    def settle(self) -> None:
        """Start what has not been started, and wait for everything."""
        for stage, reductions in self._by_stage.items():
            for found in reductions:
                if stage in self._put_off:
                    found.arm(last=True)
                found.settle(last=True)

    @property
    def pieces(self) -> dict[str, nn.Parameter]:
        """Under ZeRO-1, what this rank updates: flat pieces of the parameters, by path."""
        return {name: piece for zero in self._zeros for name, piece in zero.pieces.items()}

    @property
    def sharded(self) -> frozenset[str]:
        """The parameters whose update is divided."""
        return frozenset(
            name for zero in self._zeros for unit in zero.units for name in unit.parameters
        )

    def after_update(self) -> None:
        for zero in self._zeros:
            zero.after_update()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (path, whole gradient) of sharded parameters. All ranks must run through it."""
        for zero in self._zeros:
            yield from zero.gradients()

    def saved(self, name: str, value: Tensor) -> Any:
        zero = next((zero for zero in self._zeros if name in zero.pieces), None)
        return value if zero is None else zero.saved(name, value)


def in_order(plan: Plan, position: int, paths: Sequence[Named]) -> dict[int, Named]:
    """Return the parameters of a position's stages, in the order of their last backwards."""
    row = plan.order[position]
    ends = {action.stage: at for at, action in enumerate(row) if action.kind in "BW"}
    return {stage: paths[stage] for stage in sorted(ends, key=lambda stage: ends[stage])}
