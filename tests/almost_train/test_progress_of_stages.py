"""Every stage that takes long says how far it is where nobody has a terminal: done, rate, time left."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import find_data
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.progress import PipeProgress, Progress
from almost_train.synthetic.prompt_sets import load_seed_set

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = re.compile(r"^(.+): \d+ of \d+, (?:[\d.e-]+/s, \d+:\d\d:\d\d left|nothing finished in \d+:\d\d:\d\d)$")
SMALL: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 4, "max_length": 64, "device": "cpu"}
QUESTIONS = ("Where does the otter live?", "What does the owl eat?", "How big is the fox?", "Is the bear brown?")


def rows(file: Path, values: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


def prompts(folder: Path) -> Path:
    return rows(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": text} for i, text in enumerate(QUESTIONS)])


def engine(model: str) -> Any:
    return generation_engine(model, EngineOptions(device="cpu"))


def sft(folder: Path, progress: Progress) -> None:
    from almost_train.sft.run import SFTSettings, train_sft

    talks = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "By the river."}] for text in QUESTIONS
    ]
    file = rows(folder / "talks.jsonl", [{"messages": talk} for talk in talks])
    train_sft(SFTSettings(**SMALL), file, "nano/vanilla-small", folder / "sft", progress=progress)


def reward(folder: Path, progress: Progress) -> None:
    from almost_train.reward.run import RewardSettings, train_reward

    pairs = [{"prompt": text, "chosen": "By the river.", "rejected": "No."} for text in QUESTIONS * 2]
    file = rows(folder / "pairs.jsonl", pairs)
    settings = RewardSettings(**SMALL, eval_share=0.3)
    train_reward(settings, file, "nano/vanilla-small", folder / "reward", progress=progress)


def rlsf(folder: Path, progress: Progress, algorithm: str = "ppo") -> None:
    from almost_train.rlsf.job import RLSFSettings
    from almost_train.rlsf.run import rlsf

    sizes: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 4, "max_new_tokens": 6, "device": "cpu"}
    own: dict[str, Any] = {"mini_batch_size": 4} if algorithm == "ppo" else {"num_generations": 2}
    settings = RLSFSettings(algorithm=algorithm, steps=2, **sizes, **own)
    rlsf(settings, prompts(folder), "nano/sft", "nano/reward", folder / "rlsf", progress=progress)


def responses(folder: Path, progress: Progress) -> None:
    from almost_train.synthetic.responses import Configuration, ResponseSettings, synthesize_responses

    settings = ResponseSettings(prompt_set="nano", max_new_tokens=12, min_characters=1)
    one = Configuration(name="one", model="nano/vanilla-small", demonstrations="good", shots=1)
    data = find_data("nano", None)
    output = folder / "responses"
    synthesize_responses(settings, prompts(folder), [one], output, data=data, engine_for=engine, progress=progress)


def mining(folder: Path, progress: Progress) -> None:
    from almost_train.synthetic.prompts import PromptSettings, synthesize_prompts

    settings = PromptSettings(count=4, prompt_set="nano", round_size=8, max_rounds=2, accept_fewer=True, overlap=1.0)
    output, data = folder / "mined", find_data("nano", None)
    synthesize_prompts(settings, "nano/vanilla-large", output, data=data, engine_for=engine, progress=progress)


def self_play(folder: Path, progress: Progress) -> None:
    from almost_train.self_play.run import self_play
    from almost_train.self_play.turns import SelfPlaySettings

    settings = SelfPlaySettings(
        assistant_demonstrations="good",
        user_demonstrations="good",
        shots=1,
        candidates=2,
        max_turns=2,
        max_new_tokens=12,
        user_max_new_tokens=8,
    )
    seeds = load_seed_set("nano", find_data("nano", None))
    self_play(
        settings,
        prompts(folder),
        "nano/reward",
        folder / "play",
        engine_for=engine,
        demonstrations=seeds.demonstrations,
        progress=progress,
    )


STAGES: dict[str, tuple[Callable[..., None], set[str]]] = {
    "sft": (sft, {"training"}),
    "reward": (reward, {"training", "held-out answers"}),
    "ppo": (rlsf, {"RLSF (PPO)"}),
    "rloo": (partial(rlsf, algorithm="rloo"), {"RLSF (RLOO)"}),
    "grpo": (partial(rlsf, algorithm="grpo"), {"RLSF (GRPO)"}),
    "responses": (responses, {"one"}),
    "mining": (mining, {"prompts"}),
    "self-play": (self_play, {"turn 1: assistant", "turn 1: rewards", "turn 1: user"}),
}


@pytest.mark.parametrize(
    "name", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in STAGES if name != "sft")]
)
def test_lines_of_a_stage(name: str, tmp_path: Path) -> None:
    run, wanted = STAGES[name]
    stream = io.StringIO()
    run(tmp_path, PipeProgress(stream, 0.001))
    said = [LINE.match(line) for line in stream.getvalue().splitlines()]
    assert all(said), stream.getvalue()
    assert wanted <= {match[1] for match in said if match}


def test_a_training_shows_no_bars_of_libraries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sft(tmp_path, Progress())  # transformers' "Writing model shards", once a checkpoint
    assert "%|" not in capfd.readouterr().err
