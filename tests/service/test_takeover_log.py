from __future__ import annotations

from pathlib import Path

import pytest

from obsfs.service import takeover_log
from obsfs.service.takeover_log import TakeoverLog


def test_records_come_back_and_a_torn_line_does_not(tmp_path: Path) -> None:
    written = TakeoverLog(tmp_path / "j")
    written.record(["node", 2, "name\n"])
    written.record(["forget", 2])
    with (tmp_path / "j").open("ab") as file:
        file.write(b'["node", 3')
    assert takeover_log.read(tmp_path / "j").records == [["node", 2, "name\n"], ["forget", 2]]


def test_it_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover_log, "_COMPACT_AFTER", 100)
    written = TakeoverLog(tmp_path / "j", lambda: [["kept", 1]])
    for number in range(1000):
        written.record(["passing", number])
    found = takeover_log.read(tmp_path / "j").records
    assert len(found) < 200
    assert found[0] == ["kept", 1]
    assert found[-1] == ["passing", 999]
    written.close()
    assert not (tmp_path / "j").exists()
