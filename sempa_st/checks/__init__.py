"""Checks of untrusted input: model folders, settings, weights and tokenizers."""
