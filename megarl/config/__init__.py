"""Typed configuration: schema, YAML loading with overrides, and cross-checks. Imports no torch."""
