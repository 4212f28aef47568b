"""Serve a checkpoint: vLLM's servers, a gateway before them, a server for transformers, a chat page."""
