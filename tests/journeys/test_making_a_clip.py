"""A newcomer's first minutes: choose two subjects, say what they do, press the button, see the clip."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from engine import presets
from engine.job import read_job
from engine.media import video
from tests.journeys.conftest import ROOT, Server, Watched, endless, open_page, quick, wait_for

pytestmark = pytest.mark.browser


def test_two_samples_and_a_sentence_become_a_clip_by_clicks(page: Page, server: Server) -> None:
    for _ in range(2):  # the example's own two subjects go, so that every step is done by hand
        page.locator("#cast [data-act=choose]").first.click()
        page.locator("#remove-subject").click()
    expect(page.locator("#cast [data-act=choose]")).to_have_count(0)
    for name in ("rocket", "rabbit"):
        page.locator("#cast [data-act=add]").click()
        page.locator(f"#choices [data-act=sample][data-name={name}]").click()
        expect(page.locator("#cast")).to_contain_text(f"@{name}")
    page.locator("#prompt textarea").fill("on the moon, ")
    page.locator("#chips [data-mention=rabbit]").click()
    page.locator("#prompt textarea").press_sequentially("chases ")
    page.locator("#chips [data-mention=rocket]").click()
    expect(page.locator("#prompt textarea")).to_have_value(re.compile("@rabbit chases @rocket"))
    quick(page)
    page.locator("#go").click()
    expect(page.locator("#stage video")).to_be_visible()

    row = wait_for(lambda: server.row("done"), "the clip")
    assert row.job is not None and row.saved is not None
    assert [subject.name for subject in row.job.subjects] == ["rocket", "rabbit"]
    assert read_job(video.read_document(Path(row.saved["clip"])) or "").seed == row.job.seed
    expect(page.locator("#stage")).to_contain_text(str(row.job.seed))


def test_the_sanity_check_shows_its_clip_beside_the_one_that_ships(page: Page, server: Server) -> None:
    page.locator("#sanity").click()
    row = wait_for(lambda: server.row("done"), "the fixed job's clip")
    assert row.saved is not None
    expect(page.locator("#stage video")).to_have_count(2)
    expect(page.locator("#stage")).to_contain_text("This is how it should look.")
    scale = presets.load("toybox").display_scale
    made, shipped = (
        video.read_frames(clip, display_scale=scale)
        for clip in (Path(row.saved["clip"]), ROOT / "assets" / "sanity.mp4")
    )
    # The same frames on the machine that made the shipped clip; elsewhere sums are rounded in another order.
    assert np.abs(made.astype(int) - shipped).mean() < 4


def test_a_draft_is_finished_with_all_steps_and_the_same_seed(page: Page, server: Server) -> None:
    quick(page, steps=2)
    page.locator("#go").click()
    page.locator("#stage [data-act=finish]").click()
    more = wait_for(
        lambda: [row for row in server.queue.rows() if row.state in ("waiting", "running")], "the full clip"
    )
    first = server.row("done")
    assert first is not None and first.job is not None and more[0].job is not None
    full = presets.load(first.job.preset).sampling.num_inference_steps
    assert (more[0].job.seed, more[0].job.sampling.num_inference_steps) == (first.job.seed, full)
    assert more[0].job.subjects == first.job.subjects


def test_four_seeds_stand_side_by_side(page: Page, server: Server) -> None:
    quick(page, steps=1)
    page.locator("#count").get_by_text("4", exact=True).click()
    page.locator("#go").click()
    expect(page.locator("#stage .cell")).to_have_count(4)
    rows = server.queue.rows()
    assert len({row.group for row in rows}) == 1
    assert len({row.job.seed for row in rows if row.job}) == 4
    server.queue.pause()


def test_a_reload_in_mid_run_shows_the_run(page: Page, server: Server) -> None:
    endless(page)
    page.locator("#go").click()
    expect(page.locator("#stage .cell.running")).to_be_visible()
    open_page(page, server)
    expect(page.locator("#stage .cell.running [role=progressbar]")).to_be_visible()
    expect(page.locator("#stage")).to_contain_text(re.compile(r"step \d+ of 100"))


def test_cancel_stops_the_run_and_keeps_nothing(page: Page, server: Server) -> None:
    endless(page)
    page.locator("#go").click()
    expect(page.locator("#stage")).to_contain_text(re.compile(r"step \d+ of 100"))
    page.locator("#stage [data-act=cancel]").click()
    expect(page.locator("#stage")).to_contain_text("Cancelled")
    row = wait_for(lambda: server.row("cancelled"), "the row to be cancelled")
    assert row.saved is None


def test_the_cost_is_shown_before_the_button_is_pressed_and_follows_the_values(page: Page) -> None:
    before = page.locator("#cost").inner_text()
    page.get_by_label("Frames", exact=True).fill("33")
    expect(page.locator("#cost")).not_to_have_text(before)
    assert re.search(r"\d.*memory.*disk.*free", page.locator("#cost").inner_text(), re.DOTALL)


def test_leaving_out_steps_says_what_it_costs_and_makes_the_clip_cheaper(page: Page, server: Server) -> None:
    quick(page, steps=100)
    page.locator("#leave-out").scroll_into_view_if_needed()
    expect(page.locator("#leave-out")).to_contain_text(re.compile(r"Careful: \d\.\dx fewer, .+ Fast: \d\.\dx fewer"))
    expect(page.locator("#cost")).to_contain_text("memory")
    before = page.locator("#cost").inner_text()
    page.locator("#leave-out input").click()
    page.get_by_role("option", name="Fast").click()
    expect(page.locator("#cost")).not_to_have_text(before)
    server.queue.pause()
    page.locator("#go").click()
    row = wait_for(lambda: server.row("waiting"), "the job in the line")
    assert row.job is not None and row.job.sampling.step_cache == "fast"


def test_nothing_jumps_when_a_run_begins_and_ends(page: Page, watched: Watched) -> None:
    """The stage keeps its place and the button stays under the mouse at 1280 x 720."""

    def places() -> list[float]:
        boxes = [page.locator(name).bounding_box() for name in ("#stage .frame", "#go", "#prompt")]
        return [round(box[side]) for box in boxes if box for side in ("x", "y", "width", "height")]

    quick(page, steps=1)
    page.evaluate("window.scrollTo(0, 0)")
    before = places()
    page.locator("#go").click()
    expect(page.locator("#stage [role=progressbar]")).to_be_visible()
    assert places() == before
    expect(page.locator("#stage video")).to_be_visible()
    assert places() == before
