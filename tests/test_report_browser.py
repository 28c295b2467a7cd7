"""The page in a real browser: no error, tables sort and filter, no name becomes a script.

Chromium and its driver are Debian's packages ``chromium`` and ``chromium-driver``; elsewhere
``CHROMIUM`` and ``CHROMEDRIVER`` say where they are.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.reports import EVIL, evil_page

pytestmark = pytest.mark.slow


def program(variable, *names):
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(
            f"{names[0]} is not installed; apt-get install chromium chromium-driver, or set "
            f"{variable} to where it is"
        )
    return found


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program("CHROMIUM", "chromium", "chromium-browser", "google-chrome")
    # A container has no user namespaces for the sandbox, and little shared memory.
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.add_argument("--force-prefers-reduced-motion")  # a click waits for no scrolling
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(program("CHROMEDRIVER", "chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return evil_page(tmp_path_factory.mktemp("browser")).as_uri()


@pytest.fixture
def opened(browser, page):
    browser.get_log("browser")  # what earlier pages left
    browser.get(page)
    return browser


def column(driver, number):
    return driver.execute_script(
        "const t = [...document.querySelectorAll('table')].find(t => t.ariaLabel.includes('AP:'));"
        "return [...t.tBodies[0].rows].filter(r => !r.hidden)"
        ".map(r => [r.cells[arguments[0]].textContent, r.cells[arguments[0]].dataset.sort]);",
        number,
    )


def labels_table(driver):
    return driver.find_element("css selector", "table[aria-label*='AP:']")


def test_no_error_in_the_console_and_no_script_of_a_name_runs(opened):
    assert opened.title == f"About {EVIL}"
    assert opened.get_log("browser") == []
    assert len(opened.find_elements("css selector", "script")) == 1
    assert opened.execute_script("return performance.getEntriesByType('resource').length") <= 1


def test_the_policy_stops_a_script_that_should_have_got_in(opened):
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1';"
        "document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">');"
    )
    assert opened.title == f"About {EVIL}"
    opened.get_log("browser")


def test_headings_sort_rows_by_mouse_and_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    buttons = labels_table(opened).find_elements("css selector", "th button")
    names = [button.text for button in buttons]
    at = names.index("AP after")
    buttons[at].click()
    numbers = [float(value) for _, value in column(opened, at)]
    assert numbers == sorted(numbers, reverse=True)
    header = labels_table(opened).find_elements("css selector", "th")[at]
    assert header.get_attribute("aria-sort") == "descending"
    buttons[at].send_keys(Keys.ENTER)
    numbers = [float(value) for _, value in column(opened, at)]
    assert numbers == sorted(numbers)
    assert header.get_attribute("aria-sort") == "ascending"
    buttons[0].send_keys(Keys.SPACE)
    words = [text for text, _ in column(opened, 0)]
    assert {EVIL, "猫 & co"} <= set(words)
    assert [word for word in words if word.startswith("label")] == [
        f"label {k}" for k in range(4, 10)
    ]
    assert header.get_attribute("aria-sort") is None


def test_rows_are_filtered_by_all_words_and_their_number_is_said(opened):
    table = labels_table(opened)
    total = len(column(opened, 0))
    box = table.find_element("xpath", "./ancestor::div[contains(@class, 'sortable')]")
    field = box.find_element("css selector", "input[type=search]")
    field.send_keys("LABEL 5")
    assert [text for text, _ in column(opened, 0)] == ["label 5"]
    status = box.find_element("css selector", "[role=status]")
    assert status.text == f"1 of {total} rows"
    field.clear()
    field.send_keys(" ")
    assert len(column(opened, 0)) == total


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 800},
    )
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_pictures_stand_out_in_both_schemes(opened, scheme):
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    page, text, drawn = opened.execute_script(
        "const of = (e, what) => getComputedStyle(e)[what];"
        "return [of(document.body, 'backgroundColor'), of(document.body, 'color'),"
        " of(document.querySelector('figure svg text'), 'fill')];"
    )
    assert contrast(page, text) > 7
    assert contrast(page, drawn) > 7
    bright = luminance(page)
    assert bright > 0.5 if scheme == "light" else bright < 0.1


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    parts = [float(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Contrast ratio, 1 to 21."""
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)
