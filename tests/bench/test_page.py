"""The report in a browser: nothing leaves the page, tables sort and filter, it fits a phone, colours follow the system.

Driven by Playwright in a Chromium that the system has (Debian: `apt-get install chromium`); nothing is downloaded.
"""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import recorded
import synthetic

from tinylm.bench import plots, report

api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[page]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

RMSNORM = ".sheet[data-sheet='cells-rmsnorm']"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PLOTS", {name: plots.PLOTS[name] for name in ("kv_curve", "kv_vs_nokv", "rmsnorm_share")})
        path, _ = report.write([recorded.write(folder / "results", runs=1)], folder / "site")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page; at the end nothing may have been said on the console, and nothing asked for."""
    troubles: list[str] = []
    contexts = []

    def opened(width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda asked: troubles.extend([] if _inside(asked.url, address) else [asked.url]))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def _inside(url: str, address: str) -> bool:
    return url.partition("#")[0] == address or url.startswith(("data:", "blob:"))


def drawn(page: Any, *names: str) -> None:
    """Scrolls these charts (all by default) into view, and waits until they are there."""
    boxes = page.locator(".chart")
    for i in range(boxes.count()):
        if not names or boxes.nth(i).get_attribute("data-chart") in names:
            boxes.nth(i).scroll_into_view_if_needed()
            boxes.nth(i).locator("xpath=self::*[@data-drawn]").wait_for(state="attached")


def cells(table: Any, title: str) -> list[str]:
    titles = [re.sub(r"\W*$", "", text) for text in table.locator("thead th").all_inner_texts()]
    return table.locator(f"tbody td:nth-child({titles.index(title) + 1})").all_inner_texts()


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]


def test_every_chart_is_drawn_and_tells_what_it_is(open_page: Any) -> None:
    page = open_page()
    drawn(page)
    assert page.locator(".absent", has_text="could not be drawn").count() == 0
    names = {box.get_attribute("data-chart") for box in page.locator(".chart").all()}
    others = {"roofline", "verdicts", "telemetry", "calibration-0", "wall"}
    assert names == {"kv_curve", "kv_vs_nokv", "rmsnorm_share", *others}
    for plot in page.locator(".plot").all():
        assert plot.locator("svg.main-svg").count()
        assert plot.get_attribute("role") == "group" and plot.get_attribute("aria-label")
        assert page.locator(f"#{plot.get_attribute('aria-describedby')}").inner_text().strip()


def test_a_choice_without_data_takes_the_nearest_that_has_some(open_page: Any) -> None:
    page = open_page()
    drawn(page, "kv_curve")
    figure = page.locator("#figure-kv_curve")
    selects = {label.inner_text().split("\n")[0]: label.locator("select") for label in figure.locator("label").all()}
    for preset, dtype in (("nano", "fp32"), ("tiny", "bf16")):
        selects["preset" if preset == "nano" else "dtype"].select_option(preset if preset == "nano" else dtype)
        assert [selects[key].input_value() for key in ("preset", "dtype")] == [preset, dtype]
    assert figure.locator(".plot .legendtext").all_text_contents() == ["h200, with KV cache", "h200, without KV cache"]


def test_a_backend_has_a_colour_where_labels_have_charts_of_their_own(open_page: Any) -> None:
    page = open_page()
    drawn(page, "rmsnorm_share")
    plot = page.locator("#figure-rmsnorm_share .plot")
    assert plot.locator(".legendtext").all_text_contents() == list(synthetic.RMSNORM)
    traces = plot.evaluate("plot => plot.data.map((trace) => [trace.mode, trace.line.color, trace.x.join()])")
    assert len({colour for _, colour, _ in traces}) == 5 and len(traces) == 10
    assert {x for mode, _, x in traces if "lines" not in mode} == {"1001,50257"}


def test_tables_are_sorted_by_their_buttons(open_page: Any) -> None:
    page = open_page()
    table = page.locator(RMSNORM)
    table.locator("button.more").click()
    head = table.locator("th", has_text=re.compile("^time"))
    assert head.get_attribute("aria-sort") == "none"
    for direction, step in (("ascending", 1), ("descending", -1)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        times = cells(table, "time")
        known = [seconds(text) for text in times if text]
        assert len(known) > 100 and known == sorted(known)[::step]
        assert not any(times[len(known) :]), "cells without a time stay at the end"
    assert table.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


def test_tables_are_sorted_from_the_keyboard(open_page: Any) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    button = page.locator(RMSNORM).locator("th button", has_text="hidden")
    button.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "hidden", "focus stays"
    assert page.locator(RMSNORM).locator("th", has_text="hidden").get_attribute("aria-sort") == "ascending"
    assert set(cells(page.locator(RMSNORM), "hidden")) == {"256"}
    page.keyboard.press("Space")
    assert set(cells(page.locator(RMSNORM), "hidden")) == {"65536"}


def test_tables_are_filtered_by_words_and_by_choice(open_page: Any) -> None:
    page = open_page()
    table = page.locator(RMSNORM)
    table.get_by_label("dtype").select_option("fp32")
    table.get_by_label("label").select_option("h200")
    assert set(cells(table, "dtype")) == {"fp32"} and set(cells(table, "label")) == {"■ h200"}
    counted = table.get_by_role("status").inner_text()
    assert re.match(r"120 of \d+ rows, the first 15 shown", counted), counted
    table.get_by_label("find").fill("backward compile")
    assert set(cells(table, "direction")) == {"backward"} and set(cells(table, "impl")) == {"compile"}
    table.get_by_label("find").fill("no such word")
    assert table.locator("tbody tr").count() == 0 and table.get_by_role("status").inner_text().startswith("0 of")
    table.get_by_label("find").fill("")
    table.get_by_label("all columns").check()
    assert "cell" in [text.rstrip(" ↕") for text in table.locator("thead th").all_inner_texts()]


def test_on_a_phone_only_boxes_scroll_sideways(open_page: Any) -> None:
    page = open_page(width := 360, is_mobile=True, has_touch=True)
    drawn(page)
    for details in page.locator("details").all():
        details.evaluate("details => { details.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.locator(RMSNORM).locator(".scroll")
    assert wide.evaluate("box => box.scrollWidth > box.clientWidth") and wide.get_attribute("tabindex") == "0"


def test_colours_follow_the_system(open_page: Any) -> None:
    page = open_page(color_scheme="light")
    drawn(page, "kv_curve")

    def colours() -> dict[str, str]:
        texts = "getComputedStyle(document.querySelector('#figure-kv_curve .legendtext')).fill"
        return {
            "page": page.evaluate("getComputedStyle(document.body).backgroundColor"),
            "label": page.evaluate("getComputedStyle(document.querySelector('.mark-1')).color"),
            "chart": page.evaluate(texts),
        }

    light = colours()
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    dark = colours()
    assert all(light[part] != dark[part] for part in light), (light, dark)
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(300)
    assert colours() == light


def test_text_can_be_read_in_both_modes(open_page: Any) -> None:
    """WCAG 2.2 AA: 4.5 to 1, of every kind of text on the surface that it stands on."""
    kinds = ("p", ".note", ".absent", "a", "summary", "th button", "td", ".outcome-skipped", ".outcome-failed", "code")
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        surfaces = [
            page.evaluate(f"getComputedStyle(document.querySelector('{where}')).backgroundColor")
            for where in ("body", ".card")
        ]
        for kind in kinds:
            text = page.evaluate(f"getComputedStyle(document.querySelector('main {kind}')).color")
            for surface in surfaces:
                assert contrast(text, surface) >= 4.5, (scheme, kind, text, surface)


def contrast(one: str, other: str) -> float:
    from tinylm.bench.page import charts

    found = [charts._luminance([int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]) for colour in (one, other)]
    return (max(found) + 0.05) / (min(found) + 0.05)


def test_without_scripts_pictures_and_words_are_there(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    picture = page.locator("#figure-kv_curve img")
    picture.scroll_into_view_if_needed()
    assert picture.is_visible() and page.locator("#caption-roofline li").count() >= 2
