"""Materialise: rebuild what every consumer sees of a tensor from what its producers hold.

The third of SuperScaler's phases, data-dependency preserving, and fully automatic: `materialize`
turns vTensors into an `Adapter` of primitive steps, `backward` does so for the gradient, `reducers`
for weights. Reading order: adapter.py, direct.py, regular.py, choose.py, gradient.py, interpret.py.
"""

from toolkit.plan.materialize.adapter import Adapter, Buffer, Step
from toolkit.plan.materialize.choose import materialize
from toolkit.plan.materialize.gradient import Reducer, backward, reducers

__all__ = ["Adapter", "Buffer", "Reducer", "Step", "backward", "materialize", "reducers"]
