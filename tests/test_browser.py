"""The built book as a reader sees it, in headless Chromium: from the disk and from a server, light, dark and narrow."""

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from memloc import book, chapters

ROOT = Path(__file__).parents[1]
PAGES = chapters.pages(ROOT)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync", "--disable-quic")
LEGIBLE = 4.5  # WCAG 2, level AA, text of normal size

pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def html() -> Path:
    """The built pages; `make test` builds them before."""
    built = ROOT / "_build" / "html"
    return built if (built / book.STAMP).is_file() else book.build(ROOT).parent


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield chromium
        chromium.close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session", params=["file", "http"])
def address(request: pytest.FixtureRequest, html: Path) -> Iterator[str]:
    if request.param == "file":
        yield html.as_uri()
        return
    with ThreadingHTTPServer(("localhost", 0), partial(_Silent, directory=html)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


class Visit:
    """A page in the browser, and everything that went wrong on it."""

    def __init__(self, page: Page, address: str):
        self.page, self.complaints = page, []
        page.on("console", lambda said: said.type in ("error", "warning") and self.complain(said.text))
        page.on("pageerror", lambda error: self.complain(str(error)))
        page.on("requestfailed", lambda request: self.complain(f"failed: {request.url}"))
        page.on("response", lambda answer: answer.status >= 400 and self.complain(f"{answer.status}: {answer.url}"))
        page.on("request", lambda request: self.check_is_ours(request.url, address))

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    def check_is_ours(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.complain(f"not of the book: {url}")


Visitor = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visitor]:
    contexts = []

    def open_page(address: str, path: str, theme: str = "light", width: int = 1280) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 1000})
        contexts.append(context)
        context.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
        seen = Visit(context.new_page(), address)
        seen.page.goto(f"{address}/{path}", wait_until="load")
        seen.page.evaluate("document.fonts.ready")
        seen.page.wait_for_function(
            "() => !window.MathJax?.startup?.promise || MathJax.startup.promise.then(() => true)"
        )
        return seen

    yield open_page
    for context in contexts:
        context.close()


def keep(page: Page, kind: str, name: str) -> None:
    folder = ROOT / "_build" / "screenshots" / kind
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name.removeprefix('book/')}.png", full_page=True)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_without_a_complaint_and_draws_its_figures(visit: Visitor, address: str, name: str) -> None:
    seen = visit(address, f"{name}.html")
    images = seen.page.locator("article img").evaluate_all(
        "all => all.map(image => [image.getAttribute('src'), image.naturalWidth, image.alt])"
    )
    assert seen.page.locator("article h1").count() == 1
    assert [src for src, width, alt in images if width == 0 or len(alt.split()) < 4] == []
    assert seen.complaints == []


def test_the_first_address_leads_to_the_first_page(visit: Visitor, address: str) -> None:
    seen = visit(address, f"{PAGES[-1]}.html")
    seen.page.goto(f"{address}/index.html")
    seen.page.wait_for_url(f"{address}/{PAGES[0]}.html")
    assert seen.complaints == []


def test_the_search_finds_the_page_about_rewinding(visit: Visitor, address: str) -> None:
    seen = visit(address, "search.html?q=rewinding")
    seen.page.locator("#search-results a", has_text="ewinding").first.wait_for()
    assert "rewinding.html" in " ".join(
        seen.page.locator("#search-results a").evaluate_all("all => all.map(link => link.href)")
    )
    assert seen.complaints == []


def test_the_download_button_of_a_chapter_gives_its_executed_notebook(visit: Visitor, html: Path) -> None:
    chapter = next(iter(chapters.find(ROOT)))
    seen = visit(html.as_uri(), f"book/{chapter}.html")
    link = seen.page.locator(".btn-download-source-button").get_attribute("href")
    notebook = (html / "book" / str(link)).resolve()
    assert notebook == html / "_sources" / "book" / f"{chapter}.ipynb"
    assert '"output_type"' in notebook.read_text()


# Every text that a reader reads, with its colour over the first opaque background behind it.
CONTRASTS = """() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => top.slice(0, 3).map((value, i) => value * top[3] + under[i] * (1 - top[3]));
  const light = ([r, g, b]) => {
    const part = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const read = 'p, li, dt, dd, h1, h2, h3, td, th, caption, figcaption, figcaption *, a, code, .highlight pre';
  return [...document.querySelectorAll('article :is(' + read + ')')]
    .filter(element => element.checkVisibility() && element.textContent.trim())
    .filter(element => !element.closest('mjx-container, .headerlink'))
    .map(element => {
      const under = ground(element);
      const [one, other] = [light(over(parse(getComputedStyle(element).color), under)), light(under)];
      const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
      return [contrast, element.tagName + ' ' + element.textContent.trim().slice(0, 40)];
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_and_figures_are_legible(visit: Visitor, html: Path, name: str, theme: str) -> None:
    seen = visit(html.as_uri(), f"{name}.html", theme=theme)
    assert seen.page.evaluate("document.documentElement.dataset.theme") == theme
    keep(seen.page, theme, name)
    texts = seen.page.evaluate(CONTRASTS)
    assert len(texts) > 3
    assert [text for contrast, text in texts if contrast < LEGIBLE] == []
    for image in seen.page.locator("article figure:not(.photo) img").all():
        assert contrast_of_the_ink(image.screenshot()) >= LEGIBLE, image.get_attribute("alt")


def contrast_of_the_ink(png: bytes) -> float:
    """Contrast between the ground of a picture, its commonest colour, and the colour farthest from it."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    share = pixels / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722]
    levels, counts = np.unique(light.round(4), return_counts=True)
    ground = levels[counts.argmax()]
    return max((max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) for ink in (light.min(), light.max()))


@pytest.mark.parametrize("name", PAGES)
def test_nothing_scrolls_sideways_on_a_telephone(visit: Visitor, html: Path, name: str) -> None:
    seen = visit(html.as_uri(), f"{name}.html", width=390)
    keep(seen.page, "narrow", name)
    width = seen.page.evaluate("document.scrollingElement.scrollWidth")
    assert width <= seen.page.evaluate("window.innerWidth")
