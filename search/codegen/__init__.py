"""A model and its training as a Keras script of its own: `script.py` writes it."""
