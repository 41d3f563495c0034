"""The page in a browser: nothing is wider than the window, and all is there by keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teacher_cache.stages import train_student
from tests.browser import Browser, open_browser
from tests.command_line import done
from tests.tiny_runs import cache_reviews, student_config

WIDTHS = (390, 1200)
# Elements that stand out of the window, but for what can be scrolled within it.
STANDING_OUT = """
return [...document.querySelectorAll("main *, header *")]
  .filter((one) => !one.closest(".scroll") && !one.closest("details:not([open]) > :not(summary)"))
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5)
  .map((one) => one.tagName + ": " + one.textContent.slice(0, 60));
"""
# WCAG 2.1, relative luminance and contrast.
LEAST_CONTRAST = """
const lum = (rgb) => {
  const [r, g, b] = rgb.match(/[\\d.]+/g).map((one) => {
    const c = one / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = lum(getComputedStyle(document.body).backgroundColor);
const of = (rgb) => {
  const ink = lum(rgb); return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
};
const colours = [...document.querySelectorAll("p, th, td, a, summary, figcaption, small")]
  .map((one) => getComputedStyle(one).color)
  .concat([...document.querySelectorAll("svg .line")].map((one) => getComputedStyle(one).stroke));
return Math.min(...colours.map(of));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("looked-at")
    asked: dict[str, Any] = {"attention": "mean", "attention_layers": "all", "unlabeled": None}
    cache = cache_reviews(folder / "cache", tiny_bert, acl_imdb, **asked)
    runs = []
    for name, alpha in (("a-student-taught", 0.9), ("a-student-of-labels-alone", 0.0)):
        settings: dict[str, Any] = {"max_steps": 4, "log_steps": 1, "checkpoint_steps": 2}
        config = student_config(cache, folder / name, alpha=alpha, eval_fraction=0.3, **settings)
        runs.append(train_student.run(config).run)
    done("report", *runs, "--out", folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(page: Path, width: int, is_dark: bool) -> None:
    with open_browser() as browser:
        show(browser, page, width, is_dark=is_dark)
        assert browser.run("return innerWidth") == width
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run(STANDING_OUT) == []
        assert browser.run(LEAST_CONTRAST) >= 4.5
        assert browser.run("return getComputedStyle(document.body).fontSize") == "16px"
        browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.run("return document.documentElement.scrollWidth") <= width
        # Words of a picture have the size that they are drawn with.
        scales = "return [...document.querySelectorAll('figure svg')].map((one) => "
        scales += "one.getBoundingClientRect().width / one.viewBox.baseVal.width)"
        assert min(browser.run(scales)) > 0.9
        assert browser.complaints() == []


def test_by_keyboard_and_by_ear(page: Path) -> None:
    with open_browser() as browser:
        show(browser, page, 1200, is_dark=False)
        first = "return document.querySelector('a, summary, [tabindex]').textContent"
        assert browser.run(first) == "To the result"
        # What can be scrolled can be reached, and says what it is.
        assert browser.run(
            "return [...document.querySelectorAll('.scroll')].every((one) => one.tabIndex === 0 && "
            "one.getAttribute('aria-label'))"
        )
        assert browser.run(
            "return [...document.querySelectorAll('figure svg')].every((one) => "
            "one.getAttribute('aria-hidden') === 'true' && one.closest('figure')"
            ".querySelector('figcaption') && one.closest('figure').querySelector('table caption'))"
        )
        browser.run("dispatchEvent(new Event('beforeprint'))")
        assert browser.run("return document.querySelectorAll('details:not([open])').length") == 0


def show(browser: Browser, page: Path, width: int, *, is_dark: bool) -> None:
    """Open the page in a window of that width."""
    browser.emulate(width=width, scheme="dark" if is_dark else "light")
    browser.open(page)
