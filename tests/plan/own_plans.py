"""Plans written with the three primitives, as a user would put them in a file."""

from __future__ import annotations

from toolkit.plan.program import Program, Replicate, Split


def spread(program: Program, dims: dict[str, str], num: int, first: int = 0) -> None:
    """Part i of every operator on device first + i."""
    for op in program.ops():
        algorithm = Split(dims[op.op], num) if op.op in dims else Replicate(num)
        for device, part in enumerate(program.trans(op, algorithm), start=first):
            program.assign(part, device)


def samples(program: Program) -> None:
    spread(program, program.flow("ids_BT", dim=0), 2)


def megatron(program: Program) -> None:
    hidden = program.flow("blocks.*.ffn.up", dim=-1)
    names = ("query", "key", "value")
    heads = program.flow(*(f"blocks.*.attention.{name}" for name in names), dim=-1)
    spread(program, {**hidden, **heads}, 2)


def both(program: Program) -> None:
    """The batch, and the hidden dim instead in feed-forwards: in no library."""
    batch = program.flow("ids_BT", dim=0)
    spread(program, {**batch, **program.flow("blocks.*.ffn.up", dim=-1)}, 2)


def co_sharded(program: Program) -> None:
    for block in range(4):
        hidden = program.flow(f"blocks.{block}.ffn.up", dim=-1)
        program.co_shard(program.ops(*hidden), hidden, 4)
    program.assign(program.ops(), 0)


def two_stages(program: Program) -> None:
    program.assign(program.ops(), 0)
    ops = [op.op for op in program.ops()]
    begin = ops.index(program.ops("blocks.2")[0].op)
    program.assign(ops[begin:], 1)


def grid(program: Program) -> None:
    """Samples over pairs of devices, hidden features inside a pair."""
    batch = program.flow("ids_BT", dim=0)
    hidden = program.flow("blocks.*.ffn.up", dim=-1)
    for op in program.ops():
        outer = Split(batch[op.op], 2) if op.op in batch else Replicate(2)
        for pair, half in enumerate(program.trans(op, outer)):
            inner = Split(hidden[op.op], 2) if op.op in hidden else Replicate(2)
            for place, part in enumerate(program.trans(half, inner)):
                program.assign(part, 2 * pair + place)


def backwards(program: Program) -> None:
    """Parts on devices in the wrong order."""
    batch = program.flow("ids_BT", dim=0)
    for number, op in enumerate(program.ops()):
        algorithm = Split(batch[op.op], 2) if op.op in batch else Replicate(2)
        for device, part in enumerate(program.trans(op, algorithm)):
            program.assign(part, device if number % 2 else 1 - device)


def back_and_forth(program: Program) -> None:
    two_stages(program)
    program.assign(program.ops("blocks.3"), 0)


def ordered(program: Program) -> None:
    two_stages(program)
    late = program.ops("blocks.3")[-1]
    program.order(program.ops("blocks.2")[0], late)
    program.order(program.ops("blocks.0")[0], late)
