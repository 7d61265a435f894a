"""Environments that answer a policy's turns: the protocol, the built-in ones, and where they run."""
