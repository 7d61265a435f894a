"""Prompts and examples: sources of rows, templates, resumable sampling, packing."""
