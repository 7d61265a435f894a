"""Rollout engines behind one protocol, and the collector that turns prompts into scored groups."""
