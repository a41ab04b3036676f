"""One process and one set of weights that answer over HTTP: embeddings, completions and chat."""
