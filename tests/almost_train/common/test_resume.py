"""The rows of a stage that was killed."""

from pathlib import Path

from almost_train.common.resume import RowLog


def test_a_log_goes_on_after_a_cut_line(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "log.jsonl"
    with RowLog(file) as log:
        log.append({"id": 1}, {"id": 2})
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        with RowLog(file) as log:
            complete = whole[:cut].count(b"\n")
            assert log.rows == [{"id": 1}, {"id": 2}][:complete]
            log.append(*[{"id": 1}, {"id": 2}][complete:])
        assert file.read_bytes() == whole
