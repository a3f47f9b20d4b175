"""RVD: layouts of a tensor over devices, and the cheapest way from one to another.

Reading order: layouts.py (what a layout is), moves.py (one transition), prices.py (what it costs),
search.py (the cheapest path within a group of devices), between.py (from one group to another).
"""
