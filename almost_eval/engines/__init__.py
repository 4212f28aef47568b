"""What runs a model: transformers here; vLLM and OpenAI-compatible endpoints by the same protocols."""
