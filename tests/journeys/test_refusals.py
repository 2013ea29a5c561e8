"""What does not fit is refused beside the field that it is about, in one sentence, and nothing is queued."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.journeys.conftest import Server

pytestmark = pytest.mark.browser


def refusal_after(page: Page, field: Locator) -> Locator:
    """The first refusal below a field, when it stands within a hand's breadth of it."""
    found = page.locator("#form .refusal").first
    expect(found).to_be_visible()
    error, box = found.bounding_box(), field.bounding_box()
    assert error and box and 0 <= error["y"] - (box["y"] + box["height"]) < 60
    return found


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("@fox waves", "never mentions @kite"), ("@fox and @kite meet @wolf", "no such subject"), ("", "prompt is empty")],
)
def test_a_prompt_that_does_not_fit_its_cast_is_refused_beside_the_prompt(
    page: Page, server: Server, prompt: str, words: str
) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#go").click()
    expect(refusal_after(page, page.locator("#prompt"))).to_contain_text(words)
    assert server.queue.rows() == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("Frames", "80", "Use 77 or 81"), ("Width", "500", "multiples of 8"), ("Height", "4", "")],
)
def test_numbers_that_do_not_fit_are_refused_beside_them_with_the_nearest_that_do(
    page: Page, server: Server, field: str, value: str, words: str
) -> None:
    page.get_by_label(field, exact=True).fill(value)
    page.locator("#go").click()
    expect(refusal_after(page, page.get_by_label(field, exact=True))).to_contain_text(words)
    assert server.queue.rows() == []


def test_a_text_file_named_png_is_refused_beside_the_cast(page: Page, tmp_path: Path) -> None:
    false = tmp_path / "note.png"
    false.write_text("not a picture", encoding="utf-8")
    page.locator("#cast [data-act=add]").click()
    page.locator("#new-pictures input[type=file]").set_input_files(false)
    expect(page.locator("#form .refusal")).to_be_visible()
    expect(page.locator("#cast [data-act=choose]")).to_have_count(2)


def test_a_fifth_subject_finds_no_tile(page: Page) -> None:
    for name in ("car", "cat"):
        page.locator("#cast [data-act=add]").click()
        page.locator(f"#choices [data-act=sample][data-name={name}]").click()
        expect(page.locator("#cast")).to_contain_text(f"@{name}")
    expect(page.locator("#cast [data-act=add]")).to_have_count(0)
