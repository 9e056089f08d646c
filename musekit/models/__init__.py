"""Transformers and image tokenizers."""
