"""Rollout engines: the protocol, the embedded one, vLLM and SGLang servers, and what runs inside these."""
