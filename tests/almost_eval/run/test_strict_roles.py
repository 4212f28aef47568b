"""Templates that raise on roles that they do not take: one line that says which sample, and what to do."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_texts import Echo, Scripted

from almost_eval.data.sources import DataSource
from almost_eval.errors import TemplateError
from almost_eval.judge.answers import ModelSystem, Sampling
from almost_eval.judge.build import JudgeOptions, open_judge
from almost_eval.judge.records import Question
from almost_eval.models.chat import ChatTemplate
from almost_eval.nano import shipped
from almost_eval.run.runner import Run, RunRequest, open_run
from almost_eval.tasks.base import GenerationRequest
from almost_eval.types import Message, Sample

STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) or loop.index0 > 0 %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def test_the_sample_and_the_way_out_are_named(tmp_path: Path) -> None:
    file = tmp_path / "strict.jinja"
    file.write_text(STRICT)
    request = RunRequest(task="hhh", protocol="reward", model="nano/reward", data="nano", limit=2, template=str(file))
    with pytest.raises(TemplateError, match=r"sample \S+ \(user, .*assistant\): .*must alternate; give --template"):
        open_run(request)


REFUSING = "{{ raise_exception('Only tools may speak') }}"


@pytest.mark.parametrize("protocol", ["choice", "likelihood"])
def test_a_sample_that_is_scored_is_named(tmp_path: Path, protocol: str) -> None:
    (tmp_path / "never.jinja").write_text(REFUSING)
    request = RunRequest(task="hhh", protocol=protocol, data="nano", limit=2, template=str(tmp_path / "never.jinja"))
    with pytest.raises(TemplateError, match=r"sample \S+: .*Only tools may speak; give --template FILE"):
        open_run(request)


def test_only_the_sample_that_the_template_cannot_write_is_named(tmp_path: Path) -> None:
    """Of two turns it writes one alone: the first dialogue with more is the one that is told."""
    (tmp_path / "strict.jinja").write_text(STRICT)
    request = RunRequest(task="hhh", protocol="likelihood", data="nano", template=str(tmp_path / "strict.jinja"))
    plain = open_run(replace(request, template="almost"))
    with pytest.raises(TemplateError, match="must alternate") as refused:
        open_run(request)
    name = re.search(r"sample (\S+):", str(refused.value))
    assert name is not None
    ids = [sample.id for sample in plain.samples]
    turns = [len(sample.context) for sample in plain.samples]
    assert ids.index(name[1]) == next(i for i, n in enumerate(turns) if n > 1)


class Writer(Echo):
    """Renders its prompts with a template."""

    template = ChatTemplate("never", REFUSING)

    def generation(self, sample: Sample, shots: int) -> GenerationRequest:
        text = self.template.render((Message("user", self.prompts[int(sample.id)]),), add_generation_prompt=True)
        return replace(super().generation(sample, shots), prompt=text)


def test_a_sample_that_is_answered_is_named(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"sample 0: .*Only tools may speak; give --template FILE"):
        Run(Writer(["Hi"]), Scripted(lambda *_: 0.0)).execute(tmp_path / "run")


def test_a_question_is_named_to_the_model_and_to_the_judge(tmp_path: Path) -> None:
    file = tmp_path / "never.jinja"
    file.write_text(REFUSING)
    with pytest.raises(TemplateError, match=r"question 7: .*Only tools may speak; give --template FILE"):
        ModelSystem("nano/almost", [Question("7", "Hi?")], Sampling(template=str(file)))
    reward = shutil.copytree(shipped("nano/reward"), tmp_path / "reward")
    (reward / "chat_template.jinja").write_text(REFUSING)
    judge = open_judge(JudgeOptions(judge=f"reward:{reward}"), DataSource("nano", None))
    with pytest.raises(TemplateError, match=r"--judge reward:\S+: .*Only tools may speak .*its own chat template"):
        judge.check([Question("7", "Hi?")])
