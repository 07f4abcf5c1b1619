"""What a model may look like: KerasTuner HyperModels. Imports keras and keras_tuner only."""
