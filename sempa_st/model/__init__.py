"""What the model is: the module, its templates, tokenizer, base and adapter. Start with ``prompt_eol.py``."""
