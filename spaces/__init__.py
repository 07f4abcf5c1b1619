"""What a model may look like: KerasTuner HyperModels, one file each. Imports keras and keras_tuner only."""
