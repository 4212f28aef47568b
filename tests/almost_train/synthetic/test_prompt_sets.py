"""Prompt sets: the official files are the pinned ones, ours is complete and keeps its own rules."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from almost_eval.data import prompt_sets, sources
from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError
from almost_eval.types import Message
from almost_train.synthetic.filters import broken_rule
from almost_train.synthetic.overlap import OverlapIndex
from almost_train.synthetic.prompt_sets import load_seed_set, parse_demonstrations

NOWHERE = DataSource("hub", None)
QUESTION = (Message("user", "Why?"),)


@pytest.fixture(autouse=True)
def _no_network_and_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALMOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "RAW", "http://127.0.0.1:9")


class TestOfficial:
    def test_from_the_data_root(self, data_root: Path) -> None:
        found = load_seed_set("official", DataSource("hub", data_root))
        assert len(found.seed_prompts) == 100
        assert found.instruction.startswith("### Instruction:")
        assert {name: len(d.conversations) for name, d in found.demonstrations.items()} == {"HHH": 14, "Faithful": 3}
        assert {name: d.max_new_tokens for name, d in found.demonstrations.items()} == {"HHH": 384, "Faithful": 768}

    def test_the_words_before_a_prompt_are_those_of_the_file(self, data_root: Path) -> None:
        """The first n + 1 parts of the file, as the official code joins them; only blanks differ."""
        file = data_root / "github/naver-ai/ALMoST/assets/HHH_prompt.txt"
        parts = file.read_text(encoding="utf-8").split("\n\n-----")
        official = "\n\n-----".join(parts[:4]) + "\n\n-----" + "\n\nHuman: Why?\n\nAssistant: "
        hhh = load_seed_set("official", DataSource("hub", data_root)).demonstrations["HHH"]
        ours = hhh.document(QUESTION, hhh.conversations[:3])
        assert ours.split() == official.split()
        assert ours.endswith("\n\n-----\n\nHuman: Why?\n\nAssistant:")

    def test_from_the_cache(self, data_root: Path, tmp_path: Path) -> None:
        held = tmp_path / "cache" / "github/naver-ai/ALMoST/assets"
        held.mkdir(parents=True)
        for file in (data_root / "github/naver-ai/ALMoST/assets").iterdir():
            (held / file.name).write_bytes(file.read_bytes())
        assert load_seed_set("official", NOWHERE) == load_seed_set("official", DataSource("hub", data_root))

    def test_a_changed_file_is_refused(self, data_root: Path, tmp_path: Path) -> None:
        held = tmp_path / "github/naver-ai/ALMoST/assets"
        held.mkdir(parents=True)
        (held / "seed_prompts.txt").write_text("### Instruction: other\nWhy?\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"seed_prompts\.txt is not the file of naver-ai/ALMoST@4ed89fa"):
            load_seed_set("official", DataSource("hub", tmp_path))

    def test_no_network_says_what_to_do(self) -> None:
        with pytest.raises(DataError, match=r"its download failed .* pass --data-root DIR .* --prompt-set builtin"):
            load_seed_set("official", NOWHERE)

    def test_a_download_is_checked_and_kept(
        self, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import functools
        import http.server
        import threading

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

        root = tmp_path / "raw"
        (root / "naver-ai/ALMoST").mkdir(parents=True)
        (root / "naver-ai/ALMoST" / prompt_sets._OFFICIAL_COMMIT).symlink_to(data_root / "github/naver-ai/ALMoST")
        server = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "RAW", f"http://127.0.0.1:{server.server_port}")
        try:
            downloaded = load_seed_set("official", NOWHERE)
        finally:
            server.shutdown()
            server.server_close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.server_port), timeout=1)
        assert load_seed_set("official", NOWHERE).digest == downloaded.digest
        assert len(list((tmp_path / "cache").rglob("*.txt"))) == 3


class TestBuiltin:
    def test_is_large_enough_and_needs_no_network(self) -> None:
        found = load_seed_set("builtin", NOWHERE)
        assert len(found.seed_prompts) >= 100
        assert len(found.demonstrations["HHH"].conversations) >= 10
        assert sum(len(c) > 2 for c in found.demonstrations["HHH"].conversations) >= 4
        assert len(found.demonstrations["better"].conversations) >= 6

    def test_no_seed_prompt_repeats_another(self) -> None:
        index = OverlapIndex(0.5)
        for prompt in load_seed_set("builtin", NOWHERE).seed_prompts:
            assert index.nearest(prompt) is None, prompt
            index.add(prompt)

    def test_every_answer_keeps_the_rules_that_it_is_to_teach(self) -> None:
        for demonstrations in load_seed_set("builtin", NOWHERE).demonstrations.values():
            for conversation in demonstrations.conversations:
                for message in conversation[1::2]:
                    assert broken_rule(message.content, 50) is None, message.content

    def test_better_answers_are_longer(self) -> None:
        found = load_seed_set("builtin", NOWHERE).demonstrations

        def mean(name: str) -> float:
            lengths = [len(c[1].content) for c in found[name].conversations]
            return sum(lengths) / len(lengths)

        assert mean("better") > 2 * mean("HHH")

    def test_shares_no_line_with_the_official_set(self, data_root: Path) -> None:
        official = load_seed_set("official", DataSource("hub", data_root))
        ours = load_seed_set("builtin", NOWHERE)
        index = OverlapIndex(0.75)
        for prompt in official.seed_prompts:
            index.add(prompt)
        assert [p for p in ours.seed_prompts if index.nearest(p)] == []


class TestNano:
    def test_qualities_are_sets_and_the_draw_is_seeded(self) -> None:
        found = load_seed_set("nano", NOWHERE)
        assert set(found.demonstrations) == {"good", "weak", "bad"}
        assert len(set(found.seed_prompts)) == len(found.seed_prompts) >= 100
        assert load_seed_set("nano", NOWHERE).digest == found.digest
        text = found.demonstrations["good"].document(QUESTION, found.demonstrations["good"].conversations[:1])
        assert text.startswith("\n\nHuman: ")
        assert text.endswith("\n\n-----\n\nHuman: Why?\n\nAssistant:")


class TestFormat:
    def test_a_document(self) -> None:
        shots = parse_demonstrations("Be kind.\n\n-----\n\nHuman: Hi\n\nAssistant: Hello.\n\n-----\n")
        assert shots.document(QUESTION, shots.conversations) == (
            "Be kind.\n\n-----\n\nHuman: Hi\n\nAssistant: Hello.\n\n-----\n\nHuman: Why?\n\nAssistant:"
        )
        assert shots.document(QUESTION, ()) == "Be kind.\n\n-----\n\nHuman: Why?\n\nAssistant:"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("Only a header.", "has no dialogue"),
            ("Header\n\n-----\n\nHuman: Hi", "dialogue 1 .* has the turns user"),
            ("Header\n\n-----\n\nAssistant: Hi\n\nHuman: Yes", "has the turns assistant, user"),
        ],
    )
    def test_malformed(self, text: str, problem: str) -> None:
        with pytest.raises(DataError, match=problem):
            parse_demonstrations(text)

    def test_unknown_names(self) -> None:
        with pytest.raises(DataError, match="unknown prompt set 'buildin'; did you mean 'builtin'"):
            load_seed_set("buildin", NOWHERE)
        with pytest.raises(DataError, match="no demonstrations 'beter'; did you mean 'better'"):
            load_seed_set("builtin", NOWHERE).demonstration_set("beter")

    def test_the_digest_tells_sets_apart(self) -> None:
        assert load_seed_set("builtin", NOWHERE).digest != load_seed_set("nano", NOWHERE).digest
