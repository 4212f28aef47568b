"""A judge behind an OpenAI-compatible endpoint: requests within a budget, each reply in a journal before the next is
read. Uses `judge.records`. Start with `client`.
"""
