"""One device divided between prefill and decode, and divided anew as the load changes (Nexus)."""
