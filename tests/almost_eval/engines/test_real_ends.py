"""Where the answers of a real chat model end: at its end of turn and at every EOS id, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.judge.answers import ModelSystem, Sampling
from almost_eval.judge.records import Question
from almost_eval.models.chat import load_template, special_tokens
from almost_eval.progress import Progress
from almost_eval.types import Message

pytestmark = pytest.mark.real

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea, two lines, and name a ship in it, and say which harbour it comes from.",
    "Hi",
    "List three colours.",
)


def _change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content = {key: value for key, value in (content | values).items() if value != "absent"}
    file.write_text(json.dumps(content), encoding="utf-8")


def _with_eos(folder: Path, name: str, number: int) -> Path:
    for file in ("config.json", "generation_config.json"):
        _change(folder / file, eos_token_id=number)
    _change(folder / "tokenizer_config.json", eos_token=name, bos_token="<|endoftext|>")
    return folder


def test_a_turn_ends_with_the_templates_token_where_eos_is_another(real_models: Any, tmp_path: Path) -> None:
    """The template closes a turn with `<|im_end|>`; the checkpoint calls `<|endoftext|>` its EOS."""
    questions = [Question(str(at), text) for at, text in enumerate((QUESTIONS[0], "Say hello in one word."))]
    answers = {}
    for folder, name, number in (("right", "<|im_end|>", 2), ("wrong", "<|endoftext|>", 0)):
        model = _with_eos(real_models.copy(real_models.smollm2, tmp_path / folder), name, number)
        system = ModelSystem(str(model), questions, Sampling(temperature=0, max_new_tokens=80))
        made = system.write(tmp_path / f"{folder}.jsonl", Progress())
        answers[folder] = [(answer.text, answer.metadata["finish_reason"]) for answer in made.values()]
    assert answers["right"] == answers["wrong"]
    assert all(reason == "stop" and "<|im" not in text for text, reason in answers["right"])
    assert answers["right"][0][0] == "The capital of France is Paris."


@pytest.mark.parametrize("eos", [[2, 0, 7], [2, 99_999], "absent"], ids=str)
def test_answers_of_any_batch_are_those_of_transformers_alone(real_models: Any, tmp_path: Path, eos: object) -> None:
    """No pad token; EOS as a list, with an id beyond the vocabulary, or missing; and settings that are not ours."""
    import torch
    from transformers import GenerationConfig

    folder = real_models.copy(real_models.smollm2, tmp_path / "model")
    _change(folder / "config.json", eos_token_id=eos, pad_token_id="absent")
    _change(
        folder / "generation_config.json", eos_token_id=eos, pad_token_id="absent", repetition_penalty=1.7, num_beams=3
    )
    _change(folder / "tokenizer_config.json", pad_token="absent")

    engine = HFEngine(str(folder), dtype="float32", device="cpu")
    template, tokenizer = load_template("auto", engine.tokenizer), engine.tokenizer
    assert template is not None
    tokens = special_tokens(tokenizer)
    prompts = [
        template.render((Message("user", q),), add_generation_prompt=True, special_tokens=tokens) for q in QUESTIONS
    ]
    params = SamplingParams(max_new_tokens=40, stop=template.stop)
    together = [completion for [completion] in engine.generate(prompts, params)]
    for prompt, completion in zip(prompts, together, strict=True):
        assert engine.generate([prompt], params) == [[completion]]
        ids = torch.tensor([engine.encoder.encode_texts([prompt])[0].tolist()])
        plain = GenerationConfig(eos_token_id=[2, 0, 7], pad_token_id=0, max_new_tokens=40, do_sample=False)
        with torch.inference_mode():
            new = engine.model.generate(ids, generation_config=plain)[0, ids.shape[1] :].tolist()
        assert completion.finish_reason == ("stop" if new[-1] in (2, 0, 7) else "length")
        assert completion.text.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert {completion.finish_reason for completion in together} == {"stop", "length"}
