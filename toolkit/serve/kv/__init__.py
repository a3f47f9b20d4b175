"""Bookkeeping of the key-value cache: which block belongs to whom. The tensors live elsewhere."""
