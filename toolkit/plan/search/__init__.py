"""The search for a plan: how operators are split, where stages begin, and everything around it.

`search` is the entry. Reading order, from the inside out: layouts.py (a tensor over axes), local.py
(an operator's part), choice.py, links.py and block.py (a segment as a problem), intra_op.py (its
solution), linears.py (known solutions), stack.py (all segments), rows.py (what they take),
inter_op.py (stages), schedules.py, site.py, units.py, estimate.py and arrange.py (a candidate),
host.py (when something is offloaded), space.py, constraints.py and frontier.py, bench.py, trial.py
(a ground), outer.py (the loop), write.py (the plan), finalists.py (the fastest, predicted in full),
found.py (the result), measured.py (finalists timed on this machine).
"""

from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.found import Change, Found, search
from toolkit.plan.search.frontier import Candidate

__all__ = ["Candidate", "Change", "Constraints", "Found", "search"]
