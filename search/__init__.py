"""How the question is answered: Optuna explores, workers train, winners are tested."""
