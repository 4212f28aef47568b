"""What runs a language model: log-likelihoods and text by transformers, vLLM, or an OpenAI-compatible endpoint, all by
the protocols in `base`. Uses `models`. Start with `base`; then `prefix`, which is pure, and `hf`.
"""
