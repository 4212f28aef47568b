"""vLLM's own OpenAI-compatible server as a child process: how it is started for a model, and why so. Start with
`launch`.
"""
