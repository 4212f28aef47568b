"""Tokens a second of SFT, reward model, RLOO and scoring on one GPU in bfloat16, beside TRL's and lm-eval's.

    python benchmarks/gpu_run.py --data-root ../shared/data --output runs/gpu                     (one GPU, 15 minutes)
    python benchmarks/gpu_run.py --data-root ../shared/data --output runs/gpu --model ./my-1b --minutes 15
    python benchmarks/gpu_run.py --data-root ../shared/data --output runs/gpu --tiny              (a CPU: does it run?)

NOT YET RUN ON A GPU: only `--tiny`, on two CPU cores, whose figures mean nothing.

Without --model it is a Llama of 1.2 billion drawn weights with a tokenizer trained here: nothing is downloaded, and a
rate does not depend on what the weights have learnt. Texts are real: archived answers to AlpacaEval's prompts. Both
sides train all weights in bfloat16 over float32, in the same batches, on the same texts, through the same TRL release;
what differs is what surrounds TRL's trainers. The peer's side is TRL as its documentation shows it. Scoring is
`prefix_scoring.py`, MMLU with 5 shots against lm-eval's `hf` model.

Each side is a process of its own, so that peak memory and start are its own. Steps that begin after the side's share of
the minutes are not run; what is printed is of the steps that were, without the first, which compiles and allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from almost_eval.files import read_rows, write_json, write_rows

SIDES = ("sft/ours", "sft/trl", "reward/ours", "reward/trl", "rlsf/ours", "rlsf/trl")
LEARNING_RATE = 1e-5


@dataclass(frozen=True, slots=True)
class Size:
    """Of the model and of a step."""

    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    rows: int
    """Texts, or pairs."""
    steps: int
    batch_size: int
    micro_batch_size: int
    max_length: int
    completions: int
    """Of a step of RLOO, four of each prompt."""
    new_tokens: int
    mmlu: int
    """Questions of each of three subjects."""


LARGE = Size(2048, 18, 16, 32_000, 768, 12, 64, 16, 512, 64, 256, 60)
TINY = Size(64, 2, 2, 512, 8, 2, 4, 2, 512, 4, 8, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with hub/ and alpaca_eval/")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--model", type=Path, help="a language model's folder, in place of one with drawn weights")
    parser.add_argument("--minutes", type=float, default=15.0, help="of everything, about")
    parser.add_argument("--tiny", action="store_true", help="a model of no size on whatever there is")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else LARGE
    if arguments.side:
        run_side(arguments.side, size, arguments.output, arguments.minutes)
        return
    import torch

    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("no GPU is to be seen; --tiny runs the same code at no size on a CPU")
    began = time.monotonic()
    prepare(arguments, size)
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: the figures mean nothing")
    print(f"{arguments.model or 'drawn weights'}: {json.dumps(asdict(size))}\n")
    print("| | side | tokens a second | steps | seconds, whole process | peak GiB |\n|---|---|---|---|---|---|")
    for number, side in enumerate(SIDES):
        left = 60 * arguments.minutes - (time.monotonic() - began)
        share = left / (len(SIDES) - number + 1.5)  # scoring has two sides and a start of its own
        command = [sys.executable, __file__, "--data-root", str(arguments.data_root), "--output", str(arguments.output)]
        command += ["--side", side, "--minutes", str(share / 60), *(["--tiny"] if arguments.tiny else [])]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
        stage, who = side.split("/")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
            print(f"| {stage} | {who} | failed: {reason[:100]} | - | {seconds:.0f} | - |", flush=True)
            continue
        figures = json.loads((arguments.output / side / "figures.json").read_text(encoding="utf-8"))
        rate = "-" if figures["rate"] is None else f"{figures['rate']:,.0f}"
        print(f"| {stage} | {who} | {rate} | {figures['steps']} | {seconds:.0f} | {figures['peak_gib']} |", flush=True)
    print("\nScoring, MMLU with 5 shots:\n", flush=True)
    scoring = [sys.executable, str(Path(__file__).with_name("prefix_scoring.py")), "--tasks", "mmlu"]
    scoring += ["--data-root", str(arguments.data_root / "hub"), "--model", str(arguments.output / "model")]
    scoring += ["--dtype", "bfloat16", "--rounds", "1", "--agreement", "0", "--limit", str(size.mmlu), "--batch", "8"]
    subprocess.run(scoring, check=False)


def prepare(arguments: argparse.Namespace, size: Size) -> None:
    """The model, and the data of all sides: the same rows for ours and TRL's."""
    from almost_eval.nano.seeded import build_checkpoint

    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    good, bad = (
        {row["instruction"]: row["output"].strip() for row in json.loads(file.read_text(encoding="utf-8"))}
        for file in (arguments.data_root / "alpaca_eval" / f"{name}.json" for name in ("vicuna-7b", "alpaca-7b"))
    )
    prompts = [prompt for prompt in good if good[prompt] and bad.get(prompt)][: size.rows]
    if not (output / "model").exists():
        if arguments.model:
            (output / "model").symlink_to(arguments.model.resolve())
        else:
            build_checkpoint(
                output / "model",
                hidden_size=size.hidden_size,
                layers=size.layers,
                heads=size.heads,
                kv_heads=size.heads,
                vocab_size=size.vocab_size,
                max_position_embeddings=4096,
                initializer_range=0.02,
                tokenizer_text=[*good.values(), *good],
            )
    user = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = [[[{"role": "assistant", "content": text[prompt]}] for prompt in prompts] for text in (good, bad)]
    pairs = [{"prompt": u, "chosen": g, "rejected": b} for u, g, b in zip(user, *answers, strict=True)]
    write_rows(output / "pairs.jsonl", pairs)
    write_rows(output / "demonstrations.jsonl", [{"messages": row["prompt"] + row["chosen"]} for row in pairs])
    write_rows(output / "prompts.jsonl", [{"id": f"p{i:04d}", "prompt": text} for i, text in enumerate(prompts)])


# --- sides, each in a process of its own ---


def run_side(side: str, size: Size, output: Path, minutes: float) -> None:
    """Run one side and write its figures."""
    import torch

    from almost_eval.cli.command_line import import_transformers

    import_transformers()
    folder = output / side
    stage, who = side.split("/")
    steps: list[float] = (ours if who == "ours" else trl)(stage, size, output, folder, 60 * minutes)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    rates = steps[1:] or steps
    write_json(
        folder / "figures.json",
        {
            "rate": statistics.harmonic_mean(rates) if rates else None,  # steps of about as many tokens each
            "steps": len(steps),
            "peak_gib": "-" if peak is None else f"{peak:.1f}",
        },
    )


def ours(stage: str, size: Size, output: Path, folder: Path, seconds: float) -> list[float]:
    """Our stage; tokens a second of each step, from its log."""
    from almost_train.reward.run import RewardSettings, train_reward
    from almost_train.rlsf.job import RLSFSettings
    from almost_train.rlsf.run import rlsf
    from almost_train.sft.run import SFTSettings, train_sft

    shared: dict[str, Any] = {"learning_rate": LEARNING_RATE, "bf16": True, "save_every": 0, "save_minutes": 0.0}
    shared |= {"batch_size": size.batch_size, "micro_batch_size": size.micro_batch_size}
    rows = size.batch_size * size.steps
    work = folder / "stage"
    if stage == "rlsf":
        settings = RLSFSettings(
            algorithm="rloo",
            **shared | {"batch_size": size.completions, "save_every": size.steps + 1},
            steps=size.steps,
            num_generations=4,
            max_new_tokens=size.new_tokens,
            guard_window=0,
            kl_limit=1e9,
            keep_state=False,
            stop=(),
        )
        reward = str(output / "reward" / "ours" / "stage" / "model")
        rlsf(settings, output / "prompts.jsonl", str(output / "model"), reward, work)
    elif stage == "reward":
        own = RewardSettings(**shared, max_length=size.max_length, eval_share=0.0)
        train_reward(own, _first(output / "pairs.jsonl", rows, folder), str(output / "model"), work)
    else:
        demonstrations = _first(output / "demonstrations.jsonl", rows, folder)
        train_sft(
            SFTSettings(**shared, epochs=1, max_length=size.max_length), demonstrations, str(output / "model"), work
        )
    return [row["tokens_per_second"] for row in read_rows(work / "log.jsonl")[: size.steps]]


def _first(file: Path, rows: int, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "data.jsonl", read_rows(file)[:rows])
    return folder / "data.jsonl"


def trl(stage: str, size: Size, output: Path, folder: Path, seconds: float) -> list[float]:
    """TRL's trainer of the same name, as its documentation shows it; tokens a second of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

    from almost_eval.models.chat import load_template

    tokenizer: Any = AutoTokenizer.from_pretrained(output / "model")
    if not tokenizer.chat_template:
        template = load_template("almost")
        assert template is not None
        tokenizer.chat_template = template.source
    shared: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": size.micro_batch_size,
        "gradient_accumulation_steps": size.batch_size // size.micro_batch_size,
        "max_steps": size.steps,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    counted: list[int] = []  # tokens of each step
    began: list[float] = []

    class Watch(TrainerCallback):
        """When a step began and ended, and no step more after the time is up."""

        def __init__(self) -> None:
            self.start, self.ends = time.monotonic(), []  # type: ignore[var-annotated]

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.monotonic())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.monotonic())
            control.should_training_stop |= time.monotonic() - self.start > seconds

    watch, model = Watch(), str(output / "model")
    rows = size.batch_size * size.steps
    trainer: Any
    if stage == "sft":
        data = Dataset.from_list(read_rows(output / "demonstrations.jsonl")[:rows])
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=SFTConfig(**shared, max_length=size.max_length),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[watch],
        )
    elif stage == "reward":
        classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        classifier.config.pad_token_id = tokenizer.pad_token_id
        trainer = RewardTrainer(
            classifier,
            args=RewardConfig(**shared, max_length=size.max_length),
            train_dataset=Dataset.from_list(read_rows(output / "pairs.jsonl")[:rows]),
            processing_class=tokenizer,
            callbacks=[watch],
        )
    else:
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in read_rows(output / "prompts.jsonl")]
        shared["gradient_accumulation_steps"] = size.completions // size.micro_batch_size
        scorer = AutoModelForSequenceClassification.from_pretrained(
            output / "reward" / "ours" / "stage" / "model", num_labels=1, dtype=torch.bfloat16
        )
        trainer = RLOOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=scorer,
            args=RLOOConfig(**shared, num_generations=4, max_completion_length=size.new_tokens, beta=0.1),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            reward_processing_classes=tokenizer,
            callbacks=[watch],
        )
    _count_tokens(trainer, stage, counted)
    trainer.train()
    per_step = shared["gradient_accumulation_steps"]
    return [
        sum(counted[per_step * i : per_step * (i + 1)]) / (end - start)
        for i, (start, end) in enumerate(zip(began, watch.ends, strict=True))
    ]


def _count_tokens(trainer: Any, stage: str, counted: list[int]) -> None:
    """Note the real tokens of each micro-batch as it is computed: no padding; of RLOO those of the completions."""
    compute: Callable[..., Any] = trainer.compute_loss

    def counting(model: Any, inputs: Mapping[str, Any], *more: Any, **options: Any) -> Any:
        mask = inputs["completion_mask"] if stage == "rlsf" else inputs.get("attention_mask")
        if mask is None:  # a collator without padding
            counted.append(int(inputs["input_ids"].numel()))
        else:
            counted.append(int(mask.sum()))
        return compute(model, inputs, *more, **options)

    trainer.compute_loss = counting


if __name__ == "__main__":
    main()
