"""The built-in world and its models: data sets in the schemas of the real ones, a trained family; nothing to download.

`data.data_root()` is a folder laid out like the hub, made on first use and cached. The models are in `checkpoints/`,
each with a card that says how it was made (arXiv 2305.13735 at the scale of a laptop). Two more, with random weights,
are made on first use (`seeded.py`): they answer at chance, and show that everything runs.
Nothing heavy is imported here, so that the command line can list the names below.
"""

from pathlib import Path

SHIPPED = ("nano/almost", "nano/sft", "nano/reward", "nano/vanilla-small", "nano/vanilla-medium", "nano/vanilla-large")
"""Names of the trained models: the aligned policy, its SFT stage, the reward model, the vanilla models."""
SEEDED = ("nano/seeded", "nano/seeded-reward")
"""Names that `seeded.checkpoint` builds."""
BUILT_IN = SHIPPED + SEEDED

DEFAULT_MODEL = "nano/almost"
DEFAULT_REWARD_MODEL = "nano/reward"


def shipped(name: str) -> Path:
    """The folder of a trained model."""
    return Path(__file__).parent / "checkpoints" / name.removeprefix("nano/")
