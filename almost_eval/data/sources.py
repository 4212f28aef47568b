"""Data sets, and text files of public repositories: the one place that finds a file that is not ours.

A data set is looked for in the data root (`--data-root` or `ALMOST_DATA_ROOT`, a folder laid out like the hub), then
on the hub. A text file is looked for in the data root, then in the cache (`ALMOST_CACHE`, default `~/.cache/almost`),
then downloaded from its pinned commit; it must have the digest that the caller states.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval import files
from almost_eval.errors import DataError, did_you_mean
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

RAW = "https://raw.githubusercontent.com"

_NAMES = ("-*.parquet", ".parquet", "-*.jsonl", ".jsonl")
"""What may follow the name of a split, as the hub names its own files first."""
_PART = re.compile(r"-(\d+)-of-(\d+)")

DATA_NAMES = {
    "hub": "the real sets, from --data-root or the hub",
    "nano": "the built-in world in the same schemas; nothing to download",
}


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where data sets come from."""

    name: str
    """`hub` (the real data sets) or `nano` (the built-in world)."""
    root: Path | None
    """A folder laid out like the hub, or None for the hub alone."""

    def read(self, dataset: str, config: str, split: str) -> list[JSONObject]:
        """All rows of a split.

        Raises:
            DataError: not under the root and not on the hub, or a file that cannot be read.
        """
        local = self._files(dataset, config, split)
        if local:
            rows = [row for file in local for row in read_table(file)]
            if not rows:
                raise DataError(f"{local[0]} holds no rows; download it again, or choose another --data-root")
            return rows
        splits = self._from_hub(dataset, config, split)
        if split not in splits:
            raise DataError(f"data set {dataset} ({config}) has no split {split!r}; it has {', '.join(sorted(splits))}")
        return [dict(row) for row in splits[split]]

    def configs(self, dataset: str) -> list[str]:
        """Names of the configurations under the root, sorted; empty where the root does not hold the data set."""
        folder = self.root / dataset if self.root else None
        if folder is None or not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def _files(self, dataset: str, config: str, split: str, names: Sequence[str] = _NAMES) -> list[Path]:
        """The files of a split under the root, in their order; none where it holds none.

        Raises:
            DataError: two sets of files, one of which is stale; or not all parts of one.
        """
        if self.root is None:
            return []
        for folder in (self.root / dataset / config, self.root / dataset / "data" / config):
            _refuse_broken_links(sorted(folder.glob(f"{split}*")))
            sets = [sorted(folder.glob(split + name)) for name in names]
            sets = [files for files in sets if files]
            if len(sets) > 1:
                raise _two_sets(folder, split, sets[0][0], sets[1][0])
            if sets:
                _check_parts(folder, split, sets[0])
                return sets[0]
        return []

    def _from_hub(self, dataset: str, config: str, split: str) -> Any:
        where = "no data root is set"
        if self.root:
            there = (self.root / dataset).is_dir()
            where = f"{self.root / dataset} holds no such rows" if there else f"{self.root / dataset} is not there"
            folder = self.root / dataset / config
            if names := sorted(file.name for file in folder.glob("*.*") if not file.name.startswith(".")):
                where = f"{folder} holds {', '.join(names[:4])}, where {split}.parquet or {split}.jsonl would be read,"
        self._check_hub_may_be_read(dataset, config)
        try:
            import datasets

            with _offline_where_unreachable():
                return datasets.load_dataset(_address_on_hub(dataset), config)
        except Exception as error:  # offline, refused, unknown: the hub client raises a dozen unrelated kinds
            raise DataError(
                f"data set {_named(dataset, config)} not found: {where} and the hub could not give it "
                f"({type(error).__name__}); pass --data-root DIR with DIR/{dataset} inside, or use --data nano"
            ) from None

    def _check_hub_may_be_read(self, dataset: str, config: str | None) -> None:
        if self.name == "nano":
            raise DataError(f"the nano data holds no {_named(dataset, config)}; use --data hub for the real data set")

    @contextlib.contextmanager
    def serving_lm_eval(self) -> Iterator[None]:
        """While active, `datasets.load_dataset` looks under the root first: lm-eval's tasks name hub data sets."""
        import datasets

        original = datasets.load_dataset

        def load(path: str, name: str | None = None, **options: object) -> object:
            options = {key: value for key, value in options.items() if value is not None}
            local = self.root / path if self.root else None
            if local is not None and local.is_dir():
                if name is not None and self.name == "nano" and name not in self.configs(path):
                    self._check_hub_may_be_read(path, name)
                try:
                    rows = None if options else self._as_datasets(path, name)
                    return rows or _read_folder(original, local, name, options)
                except DataError:
                    raise
                except Exception as error:  # see _from_hub
                    problem = (str(error).splitlines() or [""])[0][:120]
                    raise DataError(
                        f"{_named(str(local), name)} cannot be read: {type(error).__name__}: {problem}"
                    ) from None
            self._check_hub_may_be_read(path, name)
            try:
                with _offline_where_unreachable():
                    return original(path if "data_files" in options else _address_on_hub(path), name, **options)
            except Exception as error:  # see _from_hub
                if "data_files" in options:  # of a task of one's own
                    problem = (str(error).splitlines() or [""])[0][:160]
                    raise DataError(
                        f"the task's data_files cannot be read: {type(error).__name__}: {problem}"
                    ) from None
                raise DataError(
                    f"data set {_named(path, name)} not found: neither under the data root nor on the hub "
                    f"({type(error).__name__}); pass --data-root DIR with DIR/{path} inside"
                ) from None

        datasets.load_dataset = load
        try:
            yield
        finally:
            datasets.load_dataset = original

    def _as_datasets(self, dataset: str, config: str | None) -> DatasetDict | None:
        """The files of one configuration as a `DatasetDict` in memory, or None where the layout is another.

        Files that are named as the hub names its own are what any card says that they are. Others are taken by their
        names, as `read` takes them, where no card says otherwise.
        """
        import datasets

        assert self.root is not None
        has_card = (self.root / dataset / "README.md").exists()
        pattern = "*-*-of-*.parquet" if has_card or config is None else "*"
        folders = [self.root / dataset / (config or "")]
        if config and not has_card:
            folders.append(self.root / dataset / "data" / config)
        files = [f for folder in folders for f in folder.glob(pattern) if f.suffix in (".parquet", ".jsonl")]
        splits = sorted({file.stem.split("-")[0] for file in files})
        names = _NAMES[:1] if pattern != "*" else _NAMES  # where the pattern is the hub's, so are the files
        rows = {split: self._files(dataset, config or "", split, names) for split in splits}
        return datasets.DatasetDict({split: _as_dataset(files) for split, files in rows.items()}) if splits else None


def _two_sets(folder: Path, split: str, one: Path, other: Path) -> DataError:
    return DataError(
        f"{folder} holds {one.name} and beside it {other.name}: two sets of rows for {split!r}; remove the one that is "
        "not meant"
    )


def _check_parts(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse parts of two sets, or a set that lacks one: `test-00000-of-00002.parquet` alone is half of the rows.

    Raises:
        DataError: see above.
    """
    parts = {file: _PART.search(file.name) for file in files}
    numbered = {file: (int(part[1]), int(part[2])) for file, part in parts.items() if part}
    if not numbered:
        return
    first, (_, of) = next(iter(numbered.items()))
    seen: dict[int, Path] = {}
    for file in files:
        number, total = numbered.get(file, (-1, 0))
        if total != of or number in seen:
            raise _two_sets(folder, split, seen.get(number, first), file)
        seen[number] = file
    if missing := [number for number in range(of) if number not in seen]:
        raise DataError(
            f"{folder} holds {len(seen)} of the {of} parts of {split!r}, first {first.name}: number {missing[0]} is "
            "missing; download it too"
        )


def _refuse_broken_links(files: Sequence[Path]) -> None:
    """Raise DataError where one leads nowhere, as in a copy of a cache without its blobs."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise DataError(
                f"{file} is a link to {os.readlink(file)}, which is not there; copy the data with what its links lead "
                "to, or download it again"
            )


def _as_dataset(files: Sequence[Path]) -> Dataset:
    """Files of one split as a `Dataset` in memory, which no cache of `datasets` has a part in.

    Raises:
        DataError: they hold no rows, or cannot be read.
    """
    import datasets
    import pyarrow.parquet as parquet
    from datasets.table import InMemoryTable

    if files[0].suffix == ".parquet":
        return datasets.Dataset(InMemoryTable(parquet.read_table(list(files))))
    rows = [row for file in files for row in read_table(file)]
    if not rows:
        raise DataError(f"{files[0]} holds no rows; download it again, or choose another --data-root")
    return datasets.Dataset.from_list(rows)


def _read_folder(
    load: Callable[..., object], folder: Path, config: str | None, options: Mapping[str, object]
) -> object:
    """A folder in a layout of its own, read by `datasets`: anew, in memory.

    Its cache knows a folder by its last name, its card and the name of the configuration. So it would answer with the
    rows of another data root whose folder is called the same, or with those that were here before.

    Raises:
        DataError: nothing in the folder is called as the configuration. `datasets` would take all files for it.
    """
    import datasets

    if config is not None and not {"data_files", "data_dir"} & options.keys():
        names = datasets.get_dataset_config_names(str(folder))
        if config not in names:
            raise DataError(f"{folder} holds no configuration {config!r}: no folder of that name, and no card names it")
    with tempfile.TemporaryDirectory(prefix="almost-datasets-") as scratch:
        return load(str(folder), config, **{**options, "cache_dir": scratch, "keep_in_memory": True})


def _named(dataset: str, config: str | None) -> str:
    """For a message."""
    return f"{dataset} ({config})" if config else dataset


def _address_on_hub(dataset: str) -> str:
    """What makes `datasets` look on the hub: by a bare name it would read a folder of that name where we stand."""
    return f"hf://datasets/{dataset}" if os.path.isdir(dataset) and not os.path.isabs(dataset) else dataset


@contextlib.contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """The hub client in its offline mode (its cache alone) if the hub does not answer: else it tries for 25 s."""
    import datasets.config
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE or reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


def reachable(url: str) -> bool:
    """Whether the host takes a connection; a proxy, which stands between, is taken at its word."""
    address = urllib.parse.urlsplit(url)
    if address.scheme in urllib.request.getproxies() or "all" in urllib.request.getproxies():
        return True
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def find_data(name: str | None, root: str | Path | None, *, built_in_model: bool = False) -> DataSource:
    """The source that `--data` and `--data-root` name; built-in models default to the built-in data.

    Raises:
        DataError: an unknown name, or a root that is no folder.
    """
    name = name or ("nano" if built_in_model and not root else "hub")
    if name == "nano":
        if root:
            raise DataError("--data nano is built in and takes no --data-root; leave one of them out")
        from almost_eval.nano.data import data_root

        return DataSource("nano", data_root())
    if name != "hub":
        raise DataError(f"unknown data {name!r}; {did_you_mean(name, DATA_NAMES)}")
    root = root or os.environ.get("ALMOST_DATA_ROOT") or None
    if root is None:
        return DataSource("hub", None)
    path = Path(root).expanduser().resolve()
    if not path.is_dir():
        raise DataError(f"data root {path} is not a folder; give one laid out like the hub (org/name/config/...)")
    return DataSource("hub", path)


def fingerprint(rows: Sequence[object]) -> str:
    """sha256 over rows as canonical JSON: two runs with the same fingerprint read the same data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def malformed(dataset: str, config: str, row: int, problem: str) -> DataError:
    """The error for a row that a task cannot use. Rows count from 1."""
    return DataError(f"malformed data: {dataset}, {config}, row {row}: {problem}; mend the row or download it again")


def read_table(file: Path) -> list[JSONObject]:
    """The rows of a parquet or JSON-lines file.

    Raises:
        DataError: it cannot be read, or a row is no object.
    """
    if file.suffix != ".parquet":
        rows = files.read_rows(file)
        for number, row in enumerate(rows, 1):
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no tokenizer takes
                raise DataError(
                    f"malformed data: {file}, row {number}: half a character (a lone surrogate); mend the row"
                ) from None
        return rows
    import pyarrow.lib
    import pyarrow.parquet as parquet

    try:
        # Not `read_table` of pyarrow: that imports pyarrow.dataset, and so pandas, a third of a second.
        rows = parquet.ParquetFile(file).read().to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"{file} is not a readable parquet file ({str(error).splitlines()[0][:120]})") from None
    return rows


def pinned_text(repository: str, commit: str, path: str, sha256: str, data: DataSource, *, instead: str) -> str:
    """A text file of a public repository at a pinned commit: data root, then cache, then download.

    Args:
        repository: `owner/name` on GitHub.
        commit: or a tag.
        path: its place in the repository: `assets/seed_prompts.txt`.
        sha256: of its bytes, hex.
        data: where the data root is.
        instead: what else the user can do, the end of an error's line.

    Raises:
        DataError: it cannot be had, or is another file.
    """
    from almost_eval.nano.data import cache_dir

    mirror = f"github/{repository}/{path}"
    cached = cache_dir() / mirror
    url = f"{RAW}/{repository}/{commit}/{path}"
    instead = f"pass --data-root DIR with DIR/{mirror}, or {instead}"
    file = next((f for f in ([data.root / mirror] if data.root else []) + [cached] if f.is_file()), None)
    try:
        if file:
            content = file.read_bytes()
        else:
            with urllib.request.urlopen(url, timeout=20) as reply:
                content = reply.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        what = f"{file} cannot be read" if file else f"{path} is in no data root or cache, and its download failed"
        raise DataError(f"{what} ({error}); {instead}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(
            f"{file or url} is not the file of {repository}@{commit[:7]} (sha256 {digest[:12]}, expected "
            f"{sha256[:12]}); remove that copy: {instead}"
        )
    if file is None:
        keep(cached, content)
    return content.decode("utf-8")


def keep(cached: Path, content: bytes) -> None:
    """Put what was downloaded into the cache; one that cannot be written costs another download, no more."""
    with contextlib.suppress(OSError), files.whole_file(cached) as stream:
        stream.write(content)
