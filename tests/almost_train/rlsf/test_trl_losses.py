"""The losses of RLOO and GRPO by hand: two completions, of 2 and 6 tokens, through the trainers of a real run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from almost_eval.progress import Progress
from almost_eval.types import Message
from almost_train.common.interrupts import SaveRequests
from almost_train.common.processes import SharedStage
from almost_train.rlsf import trl
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.log import StepLog
from almost_train.rlsf.run import _prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_and_batch(folder: Path, advantages: list[float], **settings: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A trainer, its batch of two completions, and log p (2, 6) of their tokens by the policy."""
    own = RLSFSettings(
        batch_size=2, micro_batch_size=2, num_generations=2, max_new_tokens=10, device="cpu", guard_window=0, **settings
    )
    prompts = [("p", (Message("user", "How big is the cat?"),))]
    job = _prepare(own, prompts, "nano/sft", "nano/reward", SharedStage(folder, None, None), Progress())
    with StepLog(folder, 0) as log:
        made, _ = trl.make_trainer(job, log, lambda _: None, SaveRequests(0))
    trainer: Any = made
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = {
        "prompt_ids": torch.full((2, 3), 7),
        "prompt_mask": torch.ones(2, 3, dtype=torch.long),
        "completion_ids": torch.full((2, 6), 9),
        "completion_mask": torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]),
        "advantages": torch.tensor(advantages),
    }
    ids, attention = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)
    return trainer, batch, logprobs.detach()


GRPO_BY_HAND = {
    # Advantages 1 and -1. The policy is the one that sampled, so every ratio is 1 and a token's loss is
    # -advantage + 0.1 x k3. The reference gives each token twice the probability: k3 is 2 - ln 2 - 1 = 0.3069.
    "dapo": (-2 + 6) / 8 + 0.1 * (1 - math.log(2)),  # over the tokens of the batch
    "grpo": (-1 + 1) / 2 + 0.1 * (1 - math.log(2)),  # over those of each completion, then over completions
    "dr_grpo": (-2 + 6) / (2 * 10) + 0.1 * (1 - math.log(2)) * 8 / (2 * 10),  # over max_new_tokens
}


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", GRPO_BY_HAND)
def test_grpos_loss_by_hand(loss_type: str, tmp_path: Path) -> None:
    trainer, batch, logprobs = trainer_and_batch(
        tmp_path, [1.0, -1.0], algorithm="grpo", loss_type=loss_type, kl_coefficient=0.1
    )
    batch |= {"num_items_in_batch": batch["completion_mask"].sum(), "ref_per_token_logps": logprobs + math.log(2)}
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(GRPO_BY_HAND[loss_type], abs=1e-5)
    # Dr. GRPO's other half: rewards are not divided by their deviation within the prompt.
    assert trainer.scale_rewards == ("none" if loss_type == "dr_grpo" else "group")


def test_rloos_loss_by_hand(tmp_path: Path) -> None:
    trainer, batch, logprobs = trainer_and_batch(tmp_path, [2.0, -1.0], algorithm="rloo")
    # A completion is one action: the first is now 1.5 times as likely as when it was drawn, and counts as 1.2 of that.
    batch["old_logps"] = (logprobs * batch["completion_mask"]).sum(1) - torch.tensor([1.5, 1.0]).log()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx((-2 * 1.2 + 1) / 2, abs=1e-5)
