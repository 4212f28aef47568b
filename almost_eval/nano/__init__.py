"""The built-in world: tiny data sets in the schemas of the real ones, and seeded checkpoints; nothing to download.

Made on first use and cached: `data.data_root()` is a folder laid out like the hub, `seeded.checkpoint(name)` a model.
Nothing heavy is imported here, so that the command line can list the names below.
"""

BUILT_IN = ("nano/seeded", "nano/seeded-reward")
"""Names that `seeded.checkpoint` builds: random weights, which score at chance and show that everything runs."""
