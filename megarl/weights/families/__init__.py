"""One table per model family: which Hugging Face tensors make up each Megatron parameter."""
