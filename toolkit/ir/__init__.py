"""A traced model as a networkx graph of operators, each with its work."""
