"""Lowering: a plan becomes something torch runs. Rung 1 of the ladder: torch's own parallelism."""
