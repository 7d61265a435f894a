"""Folders of weights: Hugging Face, Megatron and engine shards, read and written as streams."""
