"""What the allocator makes of a training step on a CPU: resident memory beside the bytes that are alive.

    python benchmarks/training_heap.py --model runs/models/smollm2-135m-instruct
    LD_PRELOAD=LIB/libtbbmalloc_proxy.so.2 python benchmarks/training_heap.py --model ...    # of `pip install tbb`

A reward model with a LoRA reads the same rows three times, forward and backward, in bfloat16. What is alive is what
`almost-train plan` counts.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from pathlib import Path

from almost_eval.cli.command_line import import_transformers
from almost_train.common.lora import lora_config
from almost_train.pipeline.hardware import devices
from almost_train.pipeline.needs import Estimator
from almost_train.reward.run import RewardSettings


def resident() -> float:
    """GB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    arguments = parser.parse_args()
    import_transformers()
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    pairs, length = arguments.pairs, arguments.length
    settings = RewardSettings(
        lora_rank=16, batch_size=pairs, micro_batch_size=pairs, max_length=length, bf16=True, device="cpu"
    )
    need = Estimator(devices(None, None, None, "full")).reward("reward", arguments.model, settings, pairs)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, dtype=torch.bfloat16)
    base.config.pad_token_id = 0
    model = get_peft_model(base, lora_config(settings, "SEQ_CLS")).train()
    ids = torch.randint(5, 1000, (2 * pairs, length), generator=torch.Generator().manual_seed(0))
    before = resident()
    print(f"{' '.join(platform.libc_ver())}; alive in a pass, by the plan: {need.activations / 1e9:.2f} GB")
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rewards = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        held = resident() - before
        torch.nn.functional.logsigmoid(rewards[:pairs] - rewards[pairs:]).mean().backward()
        model.zero_grad()
        print(f"resident beyond the weights after the forward pass: {held:.2f} GB; {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
