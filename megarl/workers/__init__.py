"""Killable worker processes for code of others: scorers and environments."""
