"The built site in a real browser: each page of the side bar, the search, formulas, and a film that plays."

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"


def needed(there, reason):
    "Skip without what the test needs, but fail where the site has to be tested (`DLM_SITE=1`, as in .ci/run)"
    if not there:
        (pytest.fail if os.environ.get("DLM_SITE") else pytest.skip)(reason)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    needed((SITE / "index.html").exists(), "the site is not built: make docs")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    needed(chromium and driver, "no browser: apt install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in "headless no-sandbox disable-gpu disable-quic no-first-run disable-dev-shm-usage".split():
        options.add_argument(f"--{flag}")
    for flag in "background-networking component-update sync extensions default-apps".split():
        options.add_argument(f"--disable-{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def wait(browser, css):
    "The first element that matches `css`, as soon as it is there"
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import presence_of_element_located
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(presence_of_element_located((By.CSS_SELECTOR, css)), css)


def everything(browser, css, value):
    return browser.execute_script(f"return [...document.querySelectorAll(arguments[0])].map(e => {value})", css)


def test_each_page_of_the_side_bar(browser, address):
    browser.get(f"{address}/index.html")
    pages = everything(browser, ".sidebar-tree a.reference", "[e.href, e.textContent.trim()]")
    assert len(pages) == len(list((SITE.parent / "pages").rglob("*.ipynb"))) - 1, "a page is missing from the side bar"
    browser.get_log("browser")
    formulas = 0
    for href, text in pages:
        browser.get(href)
        assert wait(browser, "article h1").text.rstrip("#¶") == text
        formulas += len(everything(browser, "span.math, div.math", "1"))
        gone = browser.execute_async_script(
            "const done = arguments[0], here = location.origin;"
            "const all = [...document.querySelectorAll('a[href], img[src], script[src], link[href]')];"
            "const urls = [...new Set(all.map(e => (e.href || e.src).split('#')[0]).filter(u => u.startsWith(here)))];"
            "Promise.all(urls.map(u => fetch(u, {method: 'HEAD'}).then(r => r.ok ? null : u)))"
            ".then(found => done(found.filter(u => u)));"
        )
        assert gone == [], f"dead links on {href}"
        lost = [a for a in everything(browser, "a.reference.internal[href^='#']", "e.hash.slice(1)") if a]
        assert [a for a in lost if not browser.execute_script("return document.getElementById(arguments[0])", a)] == []
        errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        assert errors == [], f"errors on {href}"
    assert formulas > 0


def test_search_finds_symbols(browser, address):
    for symbol, page in dict(LogLinear="schedules", launch="launch", alpha="schedules").items():
        browser.get(f"{address}/index.html")
        box = wait(browser, ".sidebar-search")
        box.send_keys(symbol)
        box.submit()
        wait(browser, f"#search-results a[href*='{page}.html#dlm.']")
        found = everything(browser, "#search-results a", "e.href")
        entry = next(h for h in found if f"{page}.html#dlm." in h and h.split("#")[1].split(".")[-1] == symbol)
        browser.get(entry)
        assert browser.execute_script("return document.getElementById(location.hash.slice(1)).matches('dt.sig')")


def test_formulas_are_drawn(browser, address):
    browser.get(f"{address}/diffusion/01_schedules.html")
    wait(browser, "mjx-container svg path")
    assert everything(browser, "mjx-merror, [data-mjx-error]", "e.textContent") == []
    drawn = everything(browser, "mjx-container svg", "e.getBoundingClientRect().height > 4")
    assert len(drawn) >= 10 and all(drawn)


def test_film_plays(browser, address):
    browser.get(f"{address}/sampling/05_watching.html")
    box = ".cell_output .dlm-film"
    wait(browser, f"{box} pre span")
    text = f"return document.querySelector('{box} pre').textContent"
    browser.execute_script(
        f"const s = document.querySelector('{box} input'); s.value = 0; s.dispatchEvent(new Event('input'))"
    )
    masked = browser.execute_script(text)
    browser.execute_script(
        f"const s = document.querySelector('{box} input'); s.value = s.max; s.dispatchEvent(new Event('input'))"
    )
    assert "·" in masked and "·" not in browser.execute_script(text)


def test_code_opens_and_fits_a_phone(browser, address):
    browser.set_window_size(400, 800)
    browser.get(f"{address}/diffusion/04_objectives.html")
    wait(browser, "p.where button").click()
    assert all(everything(browser, "details.source", "e.open && e.querySelector('pre').offsetHeight > 0"))
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), "too wide"
    wait(browser, "p.where button").click()
    browser.set_window_size(1280, 900)
