"""Scorers of responses, run in worker processes, and their weighted sum."""
