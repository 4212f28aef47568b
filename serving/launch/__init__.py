"""Child processes that serve HTTP: started, watched, and ended together. Start with `process`."""
