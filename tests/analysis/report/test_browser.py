"""The page in a headless Chromium, where there is one: that of KBIT_BROWSER, or one on PATH.

CI has none, and runs points.js alone (test_scripts.py).
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from random_stores import Shape, make_store

from kbit.analysis.report.page import build_page

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
BROWSER = os.environ.get("KBIT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
if BROWSER is None:
    pytest.skip("no Chromium is on PATH, and KBIT_BROWSER names none", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="drives Chromium: pip install '.[browser]'")

# Three families, measured in two ways, of which the second is rare
STORE = make_store(Shape((3, 3, 3), (3, 4, 16), (0, 1, 3), 0.0, 0.0, 0.1, 1.0, 6, False, 3))
ACCURACY = STORE[(STORE["metric"] == "acc") & (STORE["task"] == "mean_zero_shot")]
USUAL = ACCURACY[ACCURACY["evaluation"] == "float32, all items"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    failures = pd.DataFrame({"label": ["x" * 200], "reason": ["y" * 500]})  # words longer than a telephone is wide
    path.write_text(build_page(STORE, failures, failures, {}), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Open the page without a network. What the console says, and each request beyond the file, fail the test."""
    wrong: list[str] = []
    contexts = []

    def look_at(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            wrong.append(request.url)

    def open_at(view: str = "", width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **options
        )
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", look_at)
        page.goto(address + view)
        page.wait_for_selector("#experiments thead")
        contexts.append(context)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not wrong


def read_count(page: Any) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", page.inner_text("#count"))]


def read_column(page: Any, number: int) -> list[str]:
    return [
        str(cell)
        for cell in page.eval_on_selector_all(
            f"#experiments tbody td:nth-child({number})", "cells => cells.map((cell) => cell.textContent)"
        )
    ]


def take_picture(page: Any) -> Any:
    """Return the canvas as an array of pixels: height x width x red, green, blue."""
    return np.asarray(Image.open(io.BytesIO(page.locator("#chart").screenshot())).convert("RGB"))


def find_points(page: Any) -> list[list[float]]:
    """Return where each shown point is on the screen, in the order of the table's rows."""
    script = """() => {
      const frame = document.getElementById("chart").getBoundingClientRect();
      return shown.map((p) => [frame.left + chart.toX(chart.scene.x(p)), frame.top + chart.toY(chart.scene.y(p))]);
    }"""
    return list(page.evaluate(script))


def test_filters_change_what_is_shown(open_page: Any) -> None:
    page = open_page()
    assert read_count(page) == [len(USUAL), len(USUAL)]
    before = take_picture(page)
    page.uncheck("input[name=bits][value='3']")
    kept = USUAL[USUAL["bits"] != 3]
    assert read_count(page) == [len(kept), len(USUAL)]
    assert set(read_column(page, 3)) == {"4", "16"}
    assert (take_picture(page) != before).any()
    page.click("fieldset:has(input[name=data_type]) button:has-text('none')")
    assert read_count(page) == [(USUAL["bits"] == 16).sum(), len(USUAL)]  # baselines belong to every data type
    page.click("#reset")
    assert read_count(page) == [len(USUAL), len(USUAL)]
    assert (take_picture(page) == before).all()


def test_the_address_keeps_the_view(open_page: Any) -> None:
    page = open_page()
    page.uncheck("input[name=data_type][value=nf]")
    page.click("fieldset:has(input[name=family]) button:has-text('none')")
    page.check("input[name=family][value=opt]")
    page.select_option("#hue", "data_type")
    page.select_option("#measure", "cross entropy: text")
    page.check("#frontier")
    page.uncheck("#curves")
    page.click("#experiments th:has-text('value') button")
    address = page.url
    other = open_page(address[address.index("#") :])
    assert read_count(other) == read_count(page)
    assert read_column(other, 9) == read_column(page, 9) == sorted(read_column(page, 9), key=float)
    assert (take_picture(other) == take_picture(page)).all()
    assert set(read_column(other, 2)) == {"opt"}


def test_no_family_at_all_is_said(open_page: Any) -> None:
    page = open_page()
    page.click("fieldset:has(input[name=family]) button:has-text('none')")
    assert page.inner_text("#rows") == "no rows: no experiment passes the filters"
    page.reload()
    assert read_count(page)[0] == 0


def test_the_largest_evaluation_is_shown_first(open_page: Any) -> None:
    page = open_page("#frontier=1")
    options = page.eval_on_selector_all("#evaluation option", "all => all.map((one) => one.textContent)")
    rare = len(ACCURACY) - len(USUAL)
    assert 0 < rare < len(USUAL)
    many, few = f"float32, all items ({len(USUAL)} experiments)", f"bfloat16, 8 items ({rare} experiments)"
    assert options == [many, few, "all 2, which do not compare"]
    frontiers = "#legend li:has-text('Pareto frontier')"
    assert page.locator(frontiers).count() == 3
    page.select_option("#evaluation", "")
    assert read_count(page) == [len(ACCURACY), len(ACCURACY)]
    fields = ACCURACY.groupby(["family", "evaluation"]).ngroups
    assert page.locator(frontiers).count() == fields > 3


def test_a_point_leads_to_its_row_and_a_row_to_its_point(open_page: Any) -> None:
    page = open_page("#family=opt&data_type=nf")
    places = find_points(page)
    # a point that no other one lies near
    alone = next(
        k
        for k, (x, y) in enumerate(places)
        if all(abs(x - u) + abs(y - v) > 30 for n, (u, v) in enumerate(places) if n != k)
    )
    page.mouse.move(*places[alone])
    model, key = read_column(page, 1)[alone], read_column(page, 12)[alone]
    assert page.inner_text("#tip b") == model
    page.mouse.click(*places[alone])
    page.wait_for_selector("tr[aria-current]")
    assert page.inner_text("tr[aria-current] td:last-child") == key
    assert model in page.inner_text("#selected")
    before = take_picture(page)
    other = next(name for name in read_column(page, 12) if name != key)
    page.click(f"#experiments a:text-is('{other}')")
    page.wait_for_selector(f"tr[aria-current][data-key='{other}']")
    assert (take_picture(page) != before).any()  # the ring is around another point
    page.go_back()
    page.wait_for_selector(f"tr[aria-current][data-key='{key}']")


def test_a_drag_zooms_and_back(open_page: Any) -> None:
    page = open_page()
    before = take_picture(page)
    frame = page.locator("#chart").bounding_box()
    page.mouse.move(frame["x"] + 200, frame["y"] + 100)
    page.mouse.down()
    page.mouse.move(frame["x"] + 400, frame["y"] + 300)
    page.mouse.up()
    assert page.is_visible("#unzoom")
    assert (take_picture(page) != before).any()
    page.click("#unzoom")
    page.mouse.move(0, 0)
    assert (take_picture(page) == before).all()


def test_sorting_turns_the_table_around(open_page: Any) -> None:
    page = open_page()
    head = "#experiments th:nth-child(9)"
    page.click(f"{head} button")
    assert page.get_attribute(head, "aria-sort") == "ascending"
    assert read_column(page, 9) == [f"{value:.4f}" for value in sorted(USUAL["value"])][:100]
    page.click(f"{head} button")
    assert page.get_attribute(head, "aria-sort") == "descending"
    assert read_column(page, 9) == [f"{value:.4f}" for value in sorted(USUAL["value"], reverse=True)][:100]


def test_a_telephone_needs_no_scrolling_to_the_side(open_page: Any) -> None:
    page = open_page("#frontier=1", width=420, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    x, y = find_points(page)[0]
    page.evaluate("document.getElementById('chart').scrollIntoView({block: 'center'})")
    x, y = find_points(page)[0]
    page.touchscreen.tap(x, y)
    page.wait_for_selector("tr[aria-current]")


def test_it_is_dark_where_the_system_is(open_page: Any) -> None:
    light, dark = (take_picture(open_page(scheme=scheme)) for scheme in ("light", "dark"))
    assert light[0, 0].tolist() == [255, 255, 255]
    assert dark[0, 0].tolist() == [0x16, 0x18, 0x1D]
    assert light.mean() > 200
    assert dark.mean() < 70
    page = open_page(scheme="light")
    page.select_option("#theme", "dark")
    assert (take_picture(page) == dark).all()
