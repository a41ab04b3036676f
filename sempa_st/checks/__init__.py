"""Checks of what comes from outside: folders, settings, templates, weights, tokenizers."""
