"""Policies and a reward model of transformers behind HTTP, in one process: the chat page without any server. Uses
`launch` and `gateway`. Start with `server`; `generation` lets several answers grow at the same time.
"""
