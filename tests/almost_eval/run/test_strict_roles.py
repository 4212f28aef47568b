"""Templates that raise on roles that they do not take: one line that says which sample, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from almost_eval.errors import TemplateError
from almost_eval.run.request import RunRequest, open_run

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
