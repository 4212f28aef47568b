"""Prompts with a chat template: byte for byte lm-eval's with the same flags."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_harness import SHAPES, make_task

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError, TemplateError
from almost_eval.models.chat import ChatTemplate
from almost_eval.tasks import harness
from almost_eval.tasks.base import Prompting, resolve_prompting
from almost_eval.tasks.harness import Harness
from almost_eval.tasks.harness_prompts import DocumentChat
from almost_eval.types import SampleRecord

pytest_plugins = ["benchmark_fixtures"]

Ask = Callable[..., dict[str, SampleRecord]]
LmEval = Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + message['role'] + '>' + message['content'] | trim + '</>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
CHAT_SHAPES: dict[str, dict[str, Any]] = {
    "shots": SHAPES["random-shots"],
    "description": {**SHAPES["random-shots"], "description": "Answer the questions on {{question[:1]}}.\n\n"},
    "gen-prefix": {**SHAPES["random-shots"], "gen_prefix": "The answer is", "target_delimiter": " "},
    "gen-prefix-generation": {
        **SHAPES["generation"],
        "gen_prefix": "Well: ",
        "fewshot_split": "train",
        "num_fewshot": 2,
    },
    "multiple-inputs": {**SHAPES["multiple-inputs"], "fewshot_split": "train", "num_fewshot": 2},
    "one-continuation": {**SHAPES["one-continuation"], "fewshot_split": "train", "num_fewshot": 1},
}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Harness]:
    def make(*tasks: Any, **options: Any) -> Harness:
        by_name = {task.config.task: task for task in tasks}
        monkeypatch.setattr(harness, "load_lm_eval_tasks", lambda names, data: {n: by_name[n] for n in names})
        return Harness(list(by_name), DataSource("hub", None), **options)

    return make


def with_template(checkpoint: Path, folder: Path, source: str) -> Path:
    copy = shutil.copytree(checkpoint, folder / "chat")
    (copy / "chat_template.jinja").write_text(source)
    return copy


def prompting_of(engine: HFEngine, task: Harness, template: str = "tokenizer") -> Prompting:
    return resolve_prompting(task.data, "official", template, engine.tokenizer, own_prompts=True)


@pytest.mark.parametrize("shape", CHAT_SHAPES)
@pytest.mark.parametrize("multiturn", [None, True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_prompts_are_lm_evals(
    serve: Callable[..., Harness],
    lm_eval_samples: LmEval,
    benchmark_checkpoint: Path,
    tmp_path: Path,
    shape: str,
    multiturn: bool | None,
    system: str | None,
) -> None:
    settings = CHAT_SHAPES[shape]
    checkpoint = with_template(benchmark_checkpoint, tmp_path, CHATML)
    flags: dict[str, Any] = {"system_instruction": system} | (
        {} if multiturn is None else {"fewshot_as_multiturn": multiturn}
    )
    samples, _ = lm_eval_samples(checkpoint, [make_task(shape, **settings)], limit=3, apply_chat_template=True, **flags)
    task = serve(make_task(shape, **settings), limit=3, **flags)
    task.prompting = prompting_of(HFEngine(str(checkpoint), dtype="float32"), task)
    task.check_prompting()
    mine = {sample.id: task._arguments(sample, task.max_shots) for sample in task.samples()}
    for sample in samples[shape]:
        theirs = [tuple(arguments) for arguments in sample["arguments"]]
        assert mine[f"{shape}/{sample['doc_id']}"] == theirs
    assert "<|im_start|>user" in theirs[0][0]
    assert (theirs[0][0].count("<|im_start|>user") > 1) is (multiturn is not False and task.max_shots > 0)
    assert task.settings()["fewshot_as_multiturn"] is (multiturn is not False)
    assert task.settings().get("system_instruction") == system


def test_system_instruction_without_a_template(
    serve: Callable[..., Harness], lm_eval_samples: LmEval, benchmark_checkpoint: Path
) -> None:
    settings = CHAT_SHAPES["description"]
    samples, _ = lm_eval_samples(
        benchmark_checkpoint, [make_task("t", **settings)], limit=2, system_instruction="Be brief."
    )
    task = serve(make_task("t", **settings), limit=2, system_instruction="Be brief.")
    mine = {sample.id: task._arguments(sample, task.max_shots) for sample in task.samples()}
    for sample in samples["t"]:
        assert mine[f"t/{sample['doc_id']}"] == [tuple(arguments) for arguments in sample["arguments"]]
    assert "fewshot_as_multiturn" not in task.settings()


def test_a_template_without_system_messages(
    serve: Callable[..., Harness], lm_eval_samples: LmEval, benchmark_checkpoint: Path, tmp_path: Path
) -> None:
    settings = CHAT_SHAPES["description"]
    checkpoint = with_template(benchmark_checkpoint, tmp_path, STRICT)
    samples, _ = lm_eval_samples(checkpoint, [make_task("t", **settings)], limit=2, apply_chat_template=True)
    task = serve(make_task("t", **settings), limit=2)
    engine = HFEngine(str(checkpoint), dtype="float32")
    task.prompting = prompting_of(engine, task)
    mine = {sample.id: task._arguments(sample, task.max_shots) for sample in task.samples()}
    for sample in samples["t"]:
        assert mine[f"t/{sample['doc_id']}"] == [tuple(arguments) for arguments in sample["arguments"]]
    assert "takes no system message" in task.settings()["description"]
    told = serve(make_task("t", **settings), limit=2, system_instruction="Be brief.")
    told.prompting = task.prompting
    with pytest.raises(TemplateError, match="takes no system message; leave it out"):
        told.check_prompting()


def test_turns_need_a_template(serve: Callable[..., Harness]) -> None:
    task = serve(make_task("t"), fewshot_as_multiturn=True)
    with pytest.raises(InputError, match="add --template tokenizer"):
        task.check_prompting()


def test_a_prefix_that_the_template_drops_is_refused(serve: Callable[..., Harness]) -> None:
    silent = ChatTemplate(
        "silent", "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    task = serve(make_task("t", gen_prefix="So"), prompting=replace(Prompting(), template=silent))
    with pytest.raises(TemplateError, match="does not write the answer's beginning 'So'"):
        task.requests(task.samples()[0], 0)


def test_a_template_that_drops_the_system_message_refuses_an_instruction() -> None:
    """It need not raise: many write user and assistant alone, and the instruction would be in no prompt."""
    turns = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    for source, takes in ((turns, False), (turns.replace("m.role != 'system'", "true"), True)):
        prompting = Prompting(template=ChatTemplate("mine", source))
        chat = DocumentChat(system_instruction="Be brief.")
        if takes:
            chat.check(prompting)
            continue
        with pytest.raises(TemplateError, match="takes no system message"):
            chat.check(prompting)
        assert "left out" in chat.settings(prompting, has_description=True)["description"]
