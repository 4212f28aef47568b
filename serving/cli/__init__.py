"""Every command and flag of `almost-serve` and `almost-chat`; click lives here alone. Start with `main`."""
