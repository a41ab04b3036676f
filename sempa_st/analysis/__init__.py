"""Analyses of embedding models: what their vectors look like, and where they are wrong."""
