"""`almost-chat`: a chat page, two systems side by side, and a blind arena. A client of OpenAI-compatible endpoints.

`client` speaks to endpoints, `conversation` holds what was said, `render` makes it HTML that can do nothing, `arena`
keeps a blind round blind, `app` is the page, `launch` starts models in a process of their own, `cli` is the command.
"""
