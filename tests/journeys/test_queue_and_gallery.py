"""What was asked for can be changed while it waits; what was made stays, through refresh and restart."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from app.library.clips import Clip, compare_clips, list_clips
from app.library.subjects import Subjects
from tests.journeys.conftest import Server, endless, open_page, quick, wait_for

pytestmark = pytest.mark.browser


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def queue_three(page: Page, server: Server) -> list[int]:
    """Three jobs that wait because the queue is paused."""
    server.queue.pause()
    page.locator("#count").get_by_text("3", exact=True).click()
    page.locator("#go").click()
    rows = wait_for(lambda: found if len(found := server.queue.rows()) == 3 else None, "three jobs")
    tab(page, "Queue")
    expect(page.locator("#queue-rows .job")).to_have_count(3)
    return [row.id for row in rows]


def order(server: Server) -> list[int]:
    return [row.id for row in server.queue.rows(states=["waiting"])]


def test_waiting_jobs_are_moved_duplicated_and_removed(page: Page, server: Server) -> None:
    first, second, third = queue_three(page, server)
    page.get_by_role("button", name=f"Move job {third} up").click()
    wait_for(lambda: order(server) == [first, third, second], "the job to move")
    page.get_by_role("button", name=f"Duplicate job {first}").click()
    expect(page.locator("#queue-rows .job")).to_have_count(4)
    page.get_by_role("button", name=f"Remove job {first}").click()
    expect(page.locator("#queue-rows .job")).to_have_count(3)
    assert first not in order(server)


def test_a_waiting_job_is_edited_in_generate_and_keeps_its_place(page: Page, server: Server) -> None:
    first, second, _ = queue_three(page, server)
    page.get_by_role("button", name=f"Edit job {first}").click()
    expect(page.locator("#go")).to_have_text(f"Update job {first}")
    page.locator("#prompt textarea").fill("@kite flies over @fox")
    page.locator("#go").click()
    wait_for(lambda: "flies over" in server.queue.get(first).document, "the job to change")
    expect(page.locator("#go")).to_have_text("Make clip")
    assert order(server)[:2] == [first, second]


def test_a_paused_queue_starts_nothing_until_it_is_resumed(page: Page, server: Server) -> None:
    quick(page, steps=1)
    tab(page, "Queue")
    page.get_by_role("button", name="Pause the queue").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    tab(page, "Generate")
    page.locator("#go").click()
    expect(page.locator("#stage")).to_contain_text("paused")
    tab(page, "Queue")
    page.get_by_role("button", name="Resume").click()
    wait_for(lambda: server.row("done"), "the job to be made")


def test_a_killed_worker_leaves_the_page_up_and_the_job_can_be_run_again(page: Page, server: Server) -> None:
    endless(page)
    page.locator("#go").click()
    expect(page.locator("#stage")).to_contain_text(re.compile(r"step \d+ of 100"))
    for pid in workers(server):
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    expect(page.locator("#stage")).to_contain_text("Interrupted, run again?")
    page.locator("#stage [data-act=again]").click()
    expect(page.locator("#stage .cell.running")).to_be_visible()


def workers(server: Server) -> list[int]:
    """Process numbers of the studio's workers."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [child.pid for child in children if "app.worker" in child.cmdline()]
    assert found
    return found


@pytest.fixture(scope="module")
def clips(server: Server) -> list[Clip]:
    """At least two finished clips."""
    found = list_clips(server.home)
    if len(found) < 2:
        pytest.fail("the journeys before this one make clips; run the whole folder")
    return found


def test_the_gallery_shows_all_clips_after_a_restart(page: Page, server: Server, clips: list[Clip]) -> None:
    page.goto("about:blank")  # an open page would complain, rightly, that its server has gone
    server.stop()
    server.start()
    open_page(page, server)
    tab(page, "Gallery")
    expect(page.locator("#posters .poster")).to_have_count(len(list_clips(server.home)))


def test_an_open_clip_shows_its_document_and_gives_its_settings_back(page: Page, clips: list[Clip]) -> None:
    clip = clips[0]
    assert clip.job is not None
    tab(page, "Gallery")
    page.locator(f"#posters [data-act=open][data-clip='{clip.id}']").click()
    expect(page.locator("#detail video")).to_be_visible()
    expect(page.locator("#detail table.document")).to_contain_text(str(clip.job.seed))
    page.locator("#detail [data-act=reuse]").click()
    expect(page.locator("#seed input, #seed textarea")).to_have_value(str(clip.job.seed))
    expect(page.locator("#prompt textarea")).to_have_value(clip.job.prompt)


def test_two_clips_stand_side_by_side_with_what_differs(page: Page, clips: list[Clip]) -> None:
    tab(page, "Gallery")
    for clip in clips[:2]:
        page.locator(f"#posters [data-act=compare][data-clip='{clip.id}']").click()
        expect(page.locator(f"#posters [data-act=compare][data-clip='{clip.id}']")).to_have_attribute(
            "aria-pressed", "true"
        )
    expect(page.locator("#detail video")).to_have_count(2)
    differences = compare_clips(clips[0], clips[1])
    expect(page.locator("#detail table.document tr")).to_have_count(len(differences))


def test_a_dropped_clip_opens_its_settings_in_generate(page: Page, clips: list[Clip], tmp_path: Path) -> None:
    clip = clips[0]
    assert clip.job is not None
    elsewhere = tmp_path / "from a friend.mp4"
    elsewhere.write_bytes(clip.path.read_bytes())
    tab(page, "Gallery")
    page.locator("#drop-clip input[type=file]").set_input_files(elsewhere)
    expect(page.locator("#seed input, #seed textarea")).to_have_value(str(clip.job.seed))
    expect(page.locator("#cast [data-act=choose]")).to_have_count(len(clip.job.subjects))


def test_a_video_without_a_document_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    stranger = tmp_path / "holiday.mp4"
    stranger.write_bytes(b"not a video at all")
    tab(page, "Gallery")
    page.locator("#drop-clip input[type=file]").set_input_files(stranger)
    expect(page.locator("#gallery .refusal")).to_be_visible()


def test_a_clip_is_exported_and_deleted_only_after_a_question(page: Page, server: Server) -> None:
    clip = list_clips(server.home)[-1]
    tab(page, "Gallery")
    page.locator(f"#posters [data-act=open][data-clip='{clip.id}']").click()
    page.locator("#detail [data-act=gif]").click()
    with page.expect_download() as taken:
        page.locator("#detail .note a").click()
    assert taken.value.suggested_filename == f"{clip.path.stem}.gif"
    page.locator("#detail [data-act=ask]").click()
    assert clip.path.is_file()
    page.locator("#detail [data-act=delete]").click()
    expect(page.locator(f"#posters [data-clip='{clip.id}']")).to_have_count(0)
    wait_for(lambda: not clip.path.exists(), "the file to go")


def test_a_subject_is_saved_by_name_and_comes_back(page: Page, server: Server) -> None:
    page.locator("#cast [data-act=choose]").first.click()
    page.locator("#subject-name input, #subject-name textarea").first.fill("foxy")
    page.get_by_role("button", name="Save subject").click()
    expect(page.locator("#form .note")).to_contain_text("@foxy is saved")
    page.locator("#remove-subject").click()
    page.locator("#cast [data-act=add]").click()
    page.locator("#choices [data-act=saved][data-name=foxy]").click()
    expect(page.locator("#cast")).to_contain_text("@foxy")
    assert Subjects(server.home / ".studio" / "subjects").load("foxy").name == "foxy"
