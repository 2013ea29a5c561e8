"""The doctor's checks that need no torch: what each says of a machine that is well, and of one that is not."""

from __future__ import annotations

import socket
from importlib import metadata
from pathlib import Path

from app.verbs import doctor
from app.verbs.lock import LOCK


def test_the_lock_is_what_is_installed_here():
    assert doctor.wrong_pins(LOCK.read_text(encoding="utf-8")) == []


def test_a_library_of_another_version_or_none_is_named():
    lock = (
        f"pillow=={metadata.version('pillow')}\npydantic==0.1\nnot-there==1.0\ncolorama==9 ; sys_platform == 'win32'\n"
    )
    assert doctor.wrong_pins(lock) == ["pydantic", "not-there"]


def test_little_memory_is_a_warning_with_a_cure():
    assert doctor.memory(8e9, 16e9).level == "ok"
    tight = doctor.memory(1e9, 16e9)
    assert tight.level == "warn" and "1.0 GB free of 16.0 GB" in tight.says and tight.cure


def test_outputs_that_cannot_be_written_stand_in_the_way(tmp_path: Path):
    assert doctor.writable(tmp_path / "new" / "outputs").level == "ok"
    assert list((tmp_path / "new" / "outputs").iterdir()) == []
    in_its_place = tmp_path / "outputs"
    in_its_place.write_text("a file where the folder belongs", encoding="utf-8")
    assert doctor.writable(in_its_place).level == "FAIL"


def test_disk_is_measured_where_clips_will_go_though_the_folder_is_not_there_yet(tmp_path: Path):
    assert "GB free for" in doctor.disk(tmp_path / "a" / "b").says


def test_a_taken_port_is_a_warning_with_the_next_free_one():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finding = doctor.listening(other.getsockname()[1])
    assert finding.level == "warn" and "--port" in finding.cure


def test_ffmpeg_came_along():
    assert doctor.ffmpeg().level == "ok"


def test_a_finding_is_one_line_and_its_cure_another():
    assert len(str(doctor.Finding("ok", "disk", "plenty")).splitlines()) == 1
    assert len(str(doctor.Finding("warn", "disk", "little", "Free some.")).splitlines()) == 2
