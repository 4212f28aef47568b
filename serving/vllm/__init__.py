"""vLLM's own OpenAI-compatible server as a child process: the command for a model, and why each option is as it is.
Uses `launch` and `serving.models`. Start with `launch`.
"""
