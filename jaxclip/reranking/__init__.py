"""Second stages, end to end: data, networks, training, evaluation."""
