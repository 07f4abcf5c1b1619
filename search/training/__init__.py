"""One trial in a worker: `objective.py` turns its hyperparameters into a trained model's value."""
