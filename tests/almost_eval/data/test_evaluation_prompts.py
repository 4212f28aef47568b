"""Prompt sets: what is found, in which order, and what is said when it is not."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data import prompt_sets
from almost_eval.data.prompt_sets import PromptSet, load_prompt_set
from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError

MIRROR = "github/naver-ai/ALMoST/eval/eval_prompt.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a download that is not to be had."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALMOST_CACHE", str(folder))
    monkeypatch.setattr(prompt_sets, "_OFFICIAL_URL", "http://127.0.0.1:9/eval_prompt.py")
    return folder


@pytest.fixture(scope="module")
def official(data_root: Path) -> dict[str, str]:
    prompts: dict[str, str] = json.loads((data_root / MIRROR).read_text(encoding="utf-8"))
    return prompts


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


class TestPromptSets:
    def test_builtin(self) -> None:
        builtin = load_prompt_set("builtin", DataSource("hub", None))
        assert {"static_HHH_prompt", "truthfulQA_prompt", "mmlu_question"} <= set(builtin.prompts)
        assert re.fullmatch("[0-9a-f]{64}", builtin.digest)
        assert builtin.prompts["static_HHH_prompt"].endswith("Reply")

    def test_unknown(self) -> None:
        with pytest.raises(DataError, match="unknown prompt set 'offical'; did you mean 'official'"):
            load_prompt_set("offical", DataSource("hub", None))

    @pytest.mark.usefixtures("cache")
    def test_official_from_the_data_root(self, data_root: Path, official: dict[str, str]) -> None:
        found = load_prompt_set("official", DataSource("hub", data_root))
        assert found.prompts == official
        assert found.digest == prompt_sets._OFFICIAL_DIGEST == PromptSet.of("official", official).digest

    def test_a_changed_prompt_is_refused(self, tmp_path: Path, cache: Path, official: dict[str, str]) -> None:
        mirror = tmp_path / "root" / MIRROR
        for file in (mirror, cache / MIRROR):
            file.parent.mkdir(parents=True, exist_ok=True)
            changed = {**official, "static_HHH_prompt": official["static_HHH_prompt"] + " "}
            file.write_text(json.dumps(changed), encoding="utf-8")
            with pytest.raises(DataError, match="does not hold the official prompts of naver-ai/ALMoST@4ed89fa") as e:
                _ = load_prompt_set("official", DataSource("hub", tmp_path / "root")).prompts
            assert str(file) in one_line(e.value)  # the copy to remove
            file.unlink()

    @pytest.mark.parametrize("content", ["{", "[1, 2]"])
    def test_a_broken_copy(self, tmp_path: Path, cache: Path, content: str) -> None:
        file = tmp_path / MIRROR
        file.parent.mkdir(parents=True)
        file.write_text(content)
        with pytest.raises(DataError, match="is not the JSON of a prompt set") as caught:
            _ = load_prompt_set("official", DataSource("hub", tmp_path)).prompts
        one_line(caught.value)

    @pytest.mark.usefixtures("cache")
    def test_nowhere(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="its download failed") as caught:
            _ = load_prompt_set("official", DataSource("hub", tmp_path)).prompts
        message = one_line(caught.value)
        assert f"--data-root DIR with DIR/{MIRROR}, or use --prompt-set builtin" in message


class TestReadWhereUsed:
    """Without the official words, whatever does not use them runs, and what does is refused before a weight is read."""

    @pytest.fixture
    def run(
        self,
        almost_eval: Callable[..., Any],
        tiny_checkpoint: Callable[[str], Path],
        data_root: Path,
        tmp_path: Path,
        cache: Path,
    ) -> Callable[..., Any]:
        """A benchmark on the real data, in a data root that lacks the official prompts and with no network."""
        root = tmp_path / "hub"
        root.mkdir()
        for folder in ("HuggingFaceH4", "truthfulqa"):
            (root / folder).symlink_to(data_root / folder)
        common = ("--model", tiny_checkpoint("bloom"), "--data-root", root, "--limit", 1, "--output", tmp_path / "run")
        return lambda *arguments: almost_eval(*arguments, *common)

    @pytest.mark.parametrize(
        "arguments", [("hhh", "--protocol", "likelihood"), ("truthfulqa", "--metrics", "mc1,mc2")], ids=str
    )
    def test_what_uses_none(self, run: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...]) -> None:
        assert run(*arguments).code in (0, 3)  # a random model may tie
        assert (tmp_path / "run" / "results.json").is_file()

    @pytest.mark.parametrize("arguments", [("hhh",), ("truthfulqa", "--metrics", "mc1_true_prompt,mc1")], ids=str)
    def test_what_uses_some(self, run: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...]) -> None:
        code, _, err = run(*arguments)
        assert code == 2
        assert "the official prompt set is not in the data root" in err
        assert not (tmp_path / "run").exists()


def as_python(prompts: dict[str, str]) -> str:
    """Constants of a Python file, among what must be neither read nor run."""
    lines = ['"""A docstring."""', "import os", "LIMIT = 3", 'raise SystemExit("this file was run")']
    return "\n".join([*lines, *(f"{name} = {value!r}" for name, value in prompts.items())])


class TestDownload:
    @pytest.fixture
    def serve(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
        """`serve(text)`: the pinned address gives that text; the list holds the requests."""
        body, asked = [""], list[str]()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body[0].encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/eval_prompt.py"
        monkeypatch.setattr(prompt_sets, "_OFFICIAL_URL", url)

        def give(text: str) -> list[str]:
            body[0] = text
            return asked

        yield give
        server.shutdown()
        server.server_close()

    def test_the_address_is_pinned(self) -> None:
        assert re.fullmatch(
            r"https://raw\.githubusercontent\.com/naver-ai/ALMoST/[0-9a-f]{40}/eval/eval_prompt\.py",
            prompt_sets._OFFICIAL_URL,
        )

    def test_read_as_data_and_cached(
        self, serve: Callable[[str], list[str]], cache: Path, official: dict[str, str]
    ) -> None:
        asked = serve(as_python(official))
        source = DataSource("hub", None)
        assert load_prompt_set("official", source).prompts == official
        assert json.loads((cache / MIRROR).read_text(encoding="utf-8")) == official
        assert [p.name for p in (cache / MIRROR).parent.iterdir()] == ["eval_prompt.json"]  # no scratch file
        again = load_prompt_set("official", source)
        assert again.prompts == again.prompts == official
        assert len(asked) == 1

    def test_a_changed_file_is_refused_and_not_kept(
        self, serve: Callable[[str], list[str]], cache: Path, official: dict[str, str]
    ) -> None:
        serve(as_python({**official, "vicuna_prompt": "another"}))
        with pytest.raises(DataError, match="does not hold the official prompts"):
            _ = load_prompt_set("official", DataSource("hub", None)).prompts
        assert not (cache / MIRROR).exists()

    def test_a_page_that_is_no_python(self, serve: Callable[[str], list[str]]) -> None:
        serve("<html><body>Sign in to the network</body></html>")
        with pytest.raises(DataError, match=r"gave no Python file \(a proxy's page\?\)") as caught:
            _ = load_prompt_set("official", DataSource("hub", None)).prompts
        one_line(caught.value)

    def test_a_cache_that_cannot_be_written(
        self, serve: Callable[[str], list[str]], cache: Path, official: dict[str, str]
    ) -> None:
        serve(as_python(official))
        cache.write_text("a file where the folder should be")
        assert load_prompt_set("official", DataSource("hub", None)).prompts == official
