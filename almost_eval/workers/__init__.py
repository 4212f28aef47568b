"""One piece of work shared out among processes: units, a pool that survives the loss of workers, local processes, Ray.
Knows nothing of models: `engines.pooled` and `rewards.pooled` say what a worker holds. Start with `work`, then `pool`.
"""
