"""Data sets: what is found, in which order, and what is said when it is not."""

from __future__ import annotations

import http.server
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from almost_eval.data import sources as assets
from almost_eval.data.sources import DataSource, find_data, fingerprint
from almost_eval.errors import DataError, InputError


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that no connection reaches."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(assets, "reachable", lambda url: False)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


class TestFindData:
    def test_real_data_by_default_and_nano_for_built_in_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("ALMOST_DATA_ROOT", raising=False)
        assert find_data(None, None) == DataSource("hub", None)
        assert find_data(None, None, built_in_model=True).name == "nano"
        assert find_data("hub", None, built_in_model=True).name == "hub"
        assert find_data("nano", None).name == "nano"

    def test_a_root_means_real_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_data(None, tmp_path, built_in_model=True) == DataSource("hub", tmp_path.resolve())
        monkeypatch.setenv("ALMOST_DATA_ROOT", str(tmp_path))
        assert find_data(None, None) == DataSource("hub", tmp_path.resolve())

    def test_root_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "absent", tmp_path / "file"):
            with pytest.raises(DataError, match=rf"data root {re.escape(str(path))} is not a folder") as caught:
                find_data(None, path)
            one_line(caught.value)

    def test_unknown(self) -> None:
        with pytest.raises(DataError, match="unknown data 'nanno'; did you mean 'nano'"):
            find_data("nanno", None)


class TestRead:
    def test_parquet_and_jsonl_and_several_files(self, tmp_path: Path) -> None:
        rows = [{"a": i, "b": ["x", "y"]} for i in range(6)]
        parts = tmp_path / "org/name/parts"
        parts.mkdir(parents=True)
        for i in (1, 0):
            table = pa.Table.from_pylist(rows[3 * i : 3 * i + 3])
            parquet.write_table(table, parts / f"test-0000{i}-of-00002.parquet")
        lines = tmp_path / "org/name/lines"
        lines.mkdir()
        (lines / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        source = DataSource("hub", tmp_path)
        assert source.read("org/name", "parts", "test") == source.read("org/name", "lines", "test") == rows
        assert source.configs("org/name") == ["lines", "parts"]
        assert source.configs("org/other") == []

    def test_a_line_separator_inside_a_string_ends_no_line(self, tmp_path: Path) -> None:
        folder = tmp_path / "org/name/c"
        folder.mkdir(parents=True)
        rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / "test.jsonl").write_text(text, encoding="utf-8")
        assert DataSource("hub", tmp_path).read("org/name", "c", "test") == rows

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b'{"a": 1}\n\n{"a": \n', r"malformed data: .*test\.jsonl, row 3: "),
            (b'{"a": 1}\n[2]\n', r"malformed data: .*test\.jsonl, row 2: not a JSON object"),
            (b'{"a": "\xff"}\n', r"test\.jsonl, row 1 is not UTF-8 \(invalid start byte at byte 7 of it\)"),
        ],
    )
    def test_malformed_jsonl(self, tmp_path: Path, content: bytes, problem: str) -> None:
        folder = tmp_path / "org/name/c"
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=problem) as caught:
            DataSource("hub", tmp_path).read("org/name", "c", "test")
        one_line(caught.value)

    @pytest.mark.parametrize("content", [b"", b"PAR1 this is not parquet PAR1"])
    def test_malformed_parquet(self, tmp_path: Path, content: bytes) -> None:
        folder = tmp_path / "org/name/c"
        folder.mkdir(parents=True)
        (folder / "test-00000-of-00001.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet is not a readable parquet file") as caught:
            DataSource("hub", tmp_path).read("org/name", "c", "test")
        one_line(caught.value)

    @pytest.mark.usefixtures("no_hub")
    def test_absent_and_hub_unreachable(self, tmp_path: Path) -> None:
        for root, where in ((None, "no data root is set"), (tmp_path, f"{tmp_path / 'org/name'} is not there")):
            with pytest.raises(DataError, match=re.escape(where)) as caught:
                DataSource("hub", root).read("org/name", "c", "test")
            message = one_line(caught.value)
            assert message.startswith("data set org/name (c) not found: ")
            assert "pass --data-root DIR with DIR/org/name inside, or use --data nano" in message

    @pytest.mark.usefixtures("no_hub")
    def test_a_root_without_that_split(self, tmp_path: Path) -> None:
        (tmp_path / "org/name/c").mkdir(parents=True)
        with pytest.raises(DataError, match="holds no such rows"):
            DataSource("hub", tmp_path).read("org/name", "c", "test")

    def test_a_hub_without_that_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": [], "dev": [{"a": 1}]})
        monkeypatch.setattr(assets, "reachable", lambda url: True)
        assert DataSource("hub", None).read("org/name", "c", "dev") == [{"a": 1}]
        with pytest.raises(DataError, match="has no split 'test'; it has dev, train"):
            DataSource("hub", None).read("org/name", "c", "test")

    def test_nano_holds_its_own_alone(self) -> None:
        nano = find_data("nano", None)
        assert nano.read("HuggingFaceH4/hhh_alignment", "harmless", "test")
        with pytest.raises(DataError, match="the nano data holds no org/name"):
            nano.read("org/name", "c", "test")


def test_fingerprint_is_of_the_content() -> None:
    assert fingerprint([{"a": 1, "b": "é"}]) == fingerprint([{"b": "é", "a": 1}])
    assert fingerprint([{"a": 1}, {"a": 2}]) != fingerprint([{"a": 2}, {"a": 1}])


class TestServingLmEval:
    def write(self, root: Path, name: str = "org/name/c") -> DataSource:
        folder = root / name
        folder.mkdir(parents=True)
        table = pa.table({"a": [1, 2]})
        for split in ("test", "dev"):
            parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
        return DataSource("hub", root)

    def test_rows_come_from_the_root(self, tmp_path: Path) -> None:
        source = self.write(tmp_path)
        with source.serving_lm_eval():
            found = datasets.load_dataset(path="org/name", name="c")
        assert set(found) == {"test", "dev"}
        assert list(found["test"]) == [{"a": 1}, {"a": 2}]

    def test_options_are_honoured(self, tmp_path: Path) -> None:
        source = self.write(tmp_path)
        with source.serving_lm_eval():
            rows = datasets.load_dataset("org/name", data_dir="c", split="test")
        assert isinstance(rows, datasets.Dataset)
        assert rows["a"][:] == [1, 2]

    def test_it_is_put_back(self, tmp_path: Path) -> None:
        original = datasets.load_dataset
        with self.write(tmp_path).serving_lm_eval():
            assert datasets.load_dataset is not original
        assert datasets.load_dataset is original
        with pytest.raises(ZeroDivisionError), DataSource("hub", tmp_path).serving_lm_eval():
            raise ZeroDivisionError
        assert datasets.load_dataset is original

    @pytest.mark.usefixtures("no_hub")
    def test_absent(self, tmp_path: Path) -> None:
        original = datasets.load_dataset
        with (
            pytest.raises(DataError, match=r"data set org/other \(c\) not found: .*--data-root DIR") as caught,
            self.write(tmp_path).serving_lm_eval(),
        ):
            datasets.load_dataset(path="org/other", name="c")
        one_line(caught.value)
        assert datasets.load_dataset is original

    def test_broken(self, tmp_path: Path) -> None:
        source = self.write(tmp_path)
        (tmp_path / "org/name/c/test-00000-of-00001.parquet").write_bytes(b"no parquet")
        with pytest.raises(DataError, match=r"org/name \(c\) cannot be read") as caught, source.serving_lm_eval():
            datasets.load_dataset(path="org/name", name="c")
        one_line(caught.value)


class TestOffline:
    """The hub client would try for 25 seconds, one warning after another."""

    def test_no_answer_means_its_cache_alone(self, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets.config
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        with assets._offline_where_unreachable():
            assert datasets.config.HF_HUB_OFFLINE
            assert constants.HF_HUB_OFFLINE
        after = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        assert after == before

    def test_reachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(assets.urllib.request, "getproxies", dict)
        assert not assets.reachable("http://127.0.0.1:9")
        server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
        assert assets.reachable(f"http://127.0.0.1:{server.server_port}")
        server.server_close()

    def test_a_proxy_is_taken_at_its_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(assets.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
        assert assets.reachable("https://127.0.0.1:9")


def test_data_errors_are_input_errors() -> None:
    assert issubclass(DataError, InputError)
    assert DataError.exit_code == 2


def test_nano_takes_no_data_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data nano is built in and takes no --data-root"):
        find_data("nano", tmp_path)


class TestParts:
    """Files of a split that are not all of it, or too many: rows would be missing, or counted twice."""

    @staticmethod
    def _read(root: Path, *names: str, rows: int = 1) -> list[dict[str, object]]:
        folder = root / "org/name/c"
        folder.mkdir(parents=True)
        for name in names:
            if name.endswith(".parquet"):
                parquet.write_table(pa.table({"a": [name] * rows}), folder / name)
            else:
                (folder / name).write_text("".join(json.dumps({"a": name}) + "\n" for _ in range(rows)))
        return DataSource("hub", root).read("org/name", "c", "test")

    @pytest.mark.parametrize(
        "names",
        [
            ("test-00000-of-00002-ab12.parquet", "test-00001-of-00002-cd34.parquet"),
            ("test-0.parquet", "test-1.parquet"),
            ("test.jsonl", "dev-00000-of-00002.parquet", "train.parquet"),
        ],
    )
    def test_whole_sets(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        assert [row["a"] for row in self._read(tmp_path, *names)] == [n for n in names if n.startswith("test")]

    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            (("test-00000-of-00002.parquet",), "holds 1 of the 2 parts of 'test', .*: number 1 is missing"),
            (("test-00001-of-00002.jsonl",), "number 0 is missing"),
            (("test-00000-of-00001.parquet", "test-00000-of-00001-ab12.parquet"), "two sets of rows for 'test'"),
            (("test-00000-of-00001.parquet", "test-00000-of-00002.parquet"), "two sets of rows for 'test'"),
            (("test-00000-of-00001.parquet", "test-old.parquet"), "two sets of rows for 'test'"),
            (("test-00000-of-00001.parquet", "test.parquet"), "test-00000-of-00001.parquet and beside it test.parquet"),
            (("test-00000-of-00001.parquet", "test.jsonl"), "two sets of rows for 'test'"),
        ],
    )
    def test_parts_that_are_no_set(self, tmp_path: Path, names: tuple[str, ...], problem: str) -> None:
        with pytest.raises(DataError, match=problem) as caught:
            self._read(tmp_path, *names)
        one_line(caught.value)

    @pytest.mark.parametrize("name", ["test.jsonl", "test-00000-of-00001.parquet"])
    def test_no_rows(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match=f"{name} holds no rows"):
            self._read(tmp_path, name, rows=0)

    @pytest.mark.usefixtures("no_hub")
    def test_what_is_there_and_not_read_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"c holds test\.json, test\.jsonl\.gz, where test\.parquet or test\.jsonl"):
            self._read(tmp_path, "test.jsonl.gz", "test.json")

    def test_half_a_character(self, tmp_path: Path) -> None:
        (tmp_path / "org/name/c").mkdir(parents=True)
        (tmp_path / "org/name/c/test.jsonl").write_text('{"a": "whole \\ud83d\\ude00"}\n{"a": "half \\ud83d"}\n')
        with pytest.raises(DataError, match=r"test\.jsonl, row 2: half a character") as caught:
            DataSource("hub", tmp_path).read("org/name", "c", "test")
        one_line(caught.value)
