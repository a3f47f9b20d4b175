"""Space-time scheduling: in which order blocks of work run on their devices (no torch here).

Read `action`, `problem`, `schedule`, `pipeline` for the vocabulary; `simple`, `interleaved`,
`zero_bubble`, `vee`, `shared` for the known schedules (`families` has them by name); `clock` and
`deadlock` for what a table takes and whether it can run; `bounds`, `greedy`, `repetend`,
`frontier` and `search` for finding one.
"""

from toolkit.plan.order.action import Action, Rows
from toolkit.plan.order.pipeline import Order, Stage, chain
from toolkit.plan.order.problem import Block, Edge, Problem
from toolkit.plan.order.schedule import Schedule

__all__ = ["Action", "Block", "Edge", "Order", "Problem", "Rows", "Schedule", "Stage", "chain"]
