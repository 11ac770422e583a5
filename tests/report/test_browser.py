"""The page in headless Chromium: it fits a phone, its text has contrast in both colour schemes, and a screen reader
gets headings, names and tables."""

from itertools import pairwise

import pytest

from qwen3f.report.write import write_report
from tests.report import browser
from tests.report.places import write_pipeline, write_run

NEEDS = "needs Chromium and ChromeDriver (Debian: apt-get install chromium chromium-driver)"
pytestmark = pytest.mark.skipif(browser.find() is None, reason=NEEDS)

WIDER = """
const found = [];
for (const one of document.querySelectorAll("body *")) {
  const box = one.getBoundingClientRect();
  const hidden = one.closest(".scroll, .skip, .unseen, defs, clipPath") || getComputedStyle(one).display === "none";
  if (box.width && (box.right > innerWidth + 1 || box.left < -1) && !hidden)
    found.push(one.tagName + "." + one.getAttribute("class") + " " + one.textContent.slice(0, 60));
}
return [document.documentElement.scrollWidth, innerWidth, found];
"""
CONTRAST = """
const light = (text) => {
  const parts = text.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255);
  const [r, g, b] = parts.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
const found = {};
for (const one of document.querySelectorAll("p, small, figcaption, a, th, td, h1, h2, h3, svg text, .mark")) {
  const style = getComputedStyle(one);
  const colour = one.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const pair = [light(colour), paper].sort((a, b) => b - a);
  found[colour] = (pair[0] + 0.05) / (pair[1] + 0.05);
}
return found;
"""


@pytest.fixture(scope="module")
def page():
    with browser.opened() as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    long = "averylongnamewithoutanyspaceinit" * 3
    runs = [
        write_run(root / name, text=f"words {long}", stage=stage)
        for name, stage in (("s1", "pretrain"), ("rl", "grpo"))
    ]
    place = write_pipeline(root / "P", runs, names=["pretrain_s1", f"sft_{long}"])
    return [write_report(place), write_report(runs[1])]


@pytest.mark.parametrize("which", [0, 1], ids=["pipeline", "run"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page, reports, which, width):
    page.open(reports[which], width)
    page.script("document.querySelectorAll('details').forEach((one) => { one.open = true; });")
    whole, window, wide = page.script(WIDER)
    assert wide == []
    assert whole <= window


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_the_paper(page, reports, dark):
    """The contrast is at least 4.5 to 1, which WCAG 2.1 AA asks for text of this size."""
    page.open(reports[0], 1280, dark=dark)
    found = page.script(CONTRAST)
    assert len(found) > 3
    assert min(found.values()) >= 4.5, found


def test_a_screen_reader_is_told_headings_in_order_pictures_by_name_and_tables_with_heads(page, reports):
    page.open(reports[0], 1280)
    tree = page.accessibility()
    levels = [level for role, _, level in tree if role == "heading"]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictures = [name for role, name, _ in tree if role in ("image", "img")]
    assert pictures
    assert all(pictures)
    assert {"columnheader", "rowheader", "main", "region"} <= {role for role, _, _ in tree}
    assert ("link", "Skip to the results", None) in tree


def test_nothing_in_the_page_is_refused_by_its_own_policy(page, reports):
    page.open(reports[0], 1280)
    assert page.script("return getComputedStyle(document.querySelector('.figures')).display") == "grid"
    assert page.script("return document.scripts.length") == 0
