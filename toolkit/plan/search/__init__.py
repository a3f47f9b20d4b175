"""The search for a plan: how operators are split, where stages begin, and everything around it.

Reading order: layouts.py (a tensor over axes), local.py (an operator's part), block.py (a segment
as a problem), intra_op.py (its solution), stack.py (all segments).
"""
