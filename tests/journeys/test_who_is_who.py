"""The identity report in the page: on a fresh clip, among variants, and as a reason to draw again."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.identity.report import STRIP, read_report
from tests.journeys.conftest import Server, quick, wait_for

pytestmark = pytest.mark.browser


def test_a_fresh_clip_brings_its_report_with_outlines_and_a_plot(page: Page, server: Server) -> None:
    quick(page)
    page.locator("#go").click()
    who = page.locator("#stage details.who")
    expect(who).to_be_visible()
    who.locator("summary").click()
    row = wait_for(lambda: server.row("done"), "the clip")
    assert row.saved is not None and row.job is not None
    report = read_report(Path(row.saved["clip"]))
    assert report is not None and row.saved["weakest"] == pytest.approx(report.weakest)
    assert [subject.name for subject in report.subjects] == [subject.name for subject in row.job.subjects]
    for subject in report.subjects:
        expect(who).to_contain_text(f"@{subject.name}")
    expect(who.locator("svg.plot")).to_be_visible()
    if Path(row.saved["clip"]).with_suffix(STRIP).is_file():
        strip = who.locator("img.strip")
        expect(strip).to_be_visible()
        assert strip.evaluate("image => image.complete && image.naturalWidth > 0")


def test_variants_stand_in_the_order_of_their_weakest_subject(page: Page, server: Server) -> None:
    quick(page)
    page.locator("#count label").nth(1).click()
    page.locator("#go").click()
    wait_for(lambda: len(server.queue.rows(states=["done"])) == 2, "both clips")
    expect(page.locator("#stage .cell p.who")).to_have_count(2)
    cells = page.locator("#stage .cell")
    wanted = sorted(server.queue.rows(states=["done"]), key=lambda row: (row.saved or {})["weakest"], reverse=True)
    expect(cells.nth(0)).to_have_attribute("data-row", str(wanted[0].id))
    expect(cells.nth(1)).to_have_attribute("data-row", str(wanted[1].id))


def test_a_likeness_out_of_reach_draws_further_seeds_up_to_the_limit(page: Page, server: Server) -> None:
    quick(page)
    page.get_by_label("Retry below likeness").fill("1")
    page.get_by_label("Further seeds at most").fill("2")
    page.locator("#go").click()
    wait_for(lambda: len(server.queue.rows(states=["done"])) == 3, "three clips")
    seeds = sorted(row.job.seed for row in server.queue.rows() if row.job)
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    expect(page.locator("#stage .cell")).to_have_count(3)
