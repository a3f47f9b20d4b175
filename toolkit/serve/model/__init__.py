"""The model itself: forward pass over paged KV, weights from files, sampling, tokenizer."""
