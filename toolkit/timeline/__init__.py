"""One timeline for a planned schedule, a simulated or a live engine, and a prefetch."""

from toolkit.timeline.spans import Counter, Source, Span, Timeline

__all__ = ["Counter", "Source", "Span", "Timeline"]
