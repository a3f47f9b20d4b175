"""Programs: the calls of one agent, known as one. Pure bookkeeping, no torch, no clock."""
