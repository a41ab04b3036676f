"""Rival ways to embed a sentence with a language model that was not trained for it."""
