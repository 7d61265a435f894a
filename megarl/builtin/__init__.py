"""The scorers and environments that a config names: one file has what each computes and its section. Imports no torch."""
