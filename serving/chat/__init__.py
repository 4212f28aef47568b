"""`almost-chat`: a page to chat, to compare two systems, and to vote blindly. A client of OpenAI-compatible endpoints.

Uses `launch`, `gateway` (its keys) and `local` (to start models). Start with `start`, which makes everything, then
`app`, the page. `client` speaks to endpoints, `conversation` holds what was said, `render` makes HTML of it, `arena`
keeps the names of a blind round on the server, `launch` starts models in processes of their own. `toyworld` says what
the built-in models know, `scale` what a reward is worth, `small_model` where a real small chat model comes from.
"""
