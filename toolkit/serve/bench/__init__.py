"""Load on any OpenAI-compatible URL, and what it bears: open loop, streamed, measured outside."""
