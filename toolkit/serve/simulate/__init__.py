"""Serving without a device: the engine's own scheduler and policies on a virtual clock."""
