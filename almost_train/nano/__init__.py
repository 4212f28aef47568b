"""Pre-trains the nano family, the built-in models, and measures them by ground truth. Start with `pretrain`."""
