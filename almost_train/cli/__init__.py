"""Every command and flag of `almost-train`; click lives here alone. Start with `main`."""
