"""Plan, train and serve PyTorch models on a divided machine.

`import toolkit` is instant and imports no torch; each pillar is imported when first named:
`toolkit.plan`, `toolkit.serve`, `toolkit.rag`.
"""

__version__ = "0.1.0"
