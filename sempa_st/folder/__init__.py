"""How a model lies on disk: layout, card, names, copies."""
