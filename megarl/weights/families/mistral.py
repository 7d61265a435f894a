"""Mistral: Llama's table."""

from megarl.weights.families import llama

FAMILY = llama.FAMILY
