"""The CPU kernels: C++ sources, how they are built, and their functions as Python calls."""
