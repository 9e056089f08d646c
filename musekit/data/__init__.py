"""Data: image-text shards, metadata filters, text conditions, pre-encoded tokens and the built-in dataset."""
