"""The language plans are written in: op-trans, op-assign and op-order over an OpGraph.

A `Program` is written, a `FrozenProgram` is the checked result as data. Reading order: part.py
(what a sub-operator is), select.py, program.py, frozen.py, depend.py, check.py, rules.py, halo.py,
local.py, gradient.py.
"""

from toolkit.plan.program.frozen import FrozenProgram, SubOp
from toolkit.plan.program.part import Part, Replicate, Split
from toolkit.plan.program.program import Program

__all__ = ["FrozenProgram", "Part", "Program", "Replicate", "Split", "SubOp"]
