"""Nexus and Autellix: serve a model, phases and programs scheduled on a divided device."""
