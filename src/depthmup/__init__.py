"""depth-muP: tune a small network, train a wide and deep one with the same hyperparameters.

The packages lie in the repository's top-level folders; here are links to them, so that only `depthmup` is imported.
"""
