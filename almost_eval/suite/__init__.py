"""All benchmarks of one model, and one page that shows them. Uses `run`, `judge` and `report`. Start with `plan`."""
