"""An OpenAI-compatible gateway before a policy and a reward model; `app` holds its routes."""
