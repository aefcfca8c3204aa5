"""Every page in a real browser, wide and narrow, light and dark: nothing is complained of, cut off or unreadable."""

import copy
import shutil

import numpy as np
import pytest

from posttrain_jax.evals import compare, margins, merges, report
from tests.evals import runs
from tests.marks import slow

sync_api = pytest.importorskip(
  "playwright.sync_api", reason="Playwright drives the browser: pip install playwright"
)
CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason="there is no Chromium to open pages in: apt-get install chromium"
)
EVIL = "</pre><script>alert('x')</script><img src=http://example.org/ onerror=alert(1)>$x_{$"
MANY = 20
PAGES = ("sft", "dpo", "grpo", "pairs", "compare", "two", "merge")
LOOK = """() => {
  const luminance = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const all = (selector) => [...document.querySelectorAll(selector)];
  const back = getComputedStyle(document.body).backgroundColor;
  const outside = (element) => {
    const [own, whole] = [element.getBoundingClientRect(), element.ownerSVGElement.getBoundingClientRect()];
    return own.left < whole.left - 1 || own.right > whole.right + 1 || own.top < whole.top - 1 ||
      own.bottom > whole.bottom + 1;
  };
  const overlapping = (svg) => {
    const boxes = [...svg.querySelectorAll("text")].map((t) => t.getBoundingClientRect());
    return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1 &&
      a.top < b.bottom - 2 && b.top < a.bottom - 2));
  };
  return {
    width: document.documentElement.scrollWidth,
    back: luminance(back),
    text: Math.min(...all("p, td, th, h1, h2, a, figcaption b, .note, .right, .wrong, summary")
      .map((e) => contrast(getComputedStyle(e).color, back))),
    labels: Math.min(...all("svg text").map((e) => contrast(getComputedStyle(e).fill, back))),
    lines: Math.min(...all("svg path.line, svg path.points")
      .map((e) => contrast(getComputedStyle(e).stroke, back))),
    keys: Math.min(99, ...all(".key").map((e) => contrast(getComputedStyle(e).color, back))),
    figures: all("figure svg").length,
    outside: all("figure svg *").filter(outside).map((e) => e.outerHTML.slice(0, 120)),
    overlapping: all("figure svg").filter(overlapping).map((e) => e.ariaLabel),
    letters: Math.min(...all("figure svg text").map((e) => e.getBoundingClientRect().height)),
  };
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """{name: path} of one page of each kind."""
  root = tmp_path_factory.mktemp("pages")
  answers = lambda right: runs.result(
    [runs.answer(f"{EVIL} {i}?", c, i in right, EVIL) for i, c in CHANNELS]
  )
  lines = runs.rows(120, 20)
  lines[50]["loss"], lines[70]["grad_norm"] = float("nan"), 900.0
  for line in lines[::2]:
    line[f"loss/{EVIL}"] = 1.25
  parts = dict(before=answers({5}), after=answers({0, 1, 2, 3}), trainable=EVIL)
  folders = {"sft": runs.write(root / "sft", lines=lines, **parts)}
  for name, some, objective in (
    ("dpo", runs.preference_rows(120, 20), runs.PREFERENCE),
    ("grpo", runs.grouped_rows(60), runs.GROUPED),
  ):
    config = dict(runs.CONFIG, objective=objective)
    own = {EVIL: [0.1 * i for i, _ in CHANNELS], "exact": [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]}
    after = runs.graded(answers({0, 2}), **own)
    folders[name] = runs.write(root / name, lines=some, config=config, after=after)
  made = {name: report.write(folder) for name, folder in folders.items()}
  values = np.random.default_rng(0).normal(size=(4, 40))
  compared = margins.Compared(
    values[0], values[1], *np.exp(4 + values[2:]).astype(int), texts=[(EVIL,) * 3] * 40
  )
  made["pairs"] = margins.write(folders["dpo"], compared)[1]
  made["two"] = compare.write(compare.read([folders["sft"], folders["dpo"]]), root / "two.html")
  layers = {
    str(i): merges.Overlap(np.array([[1.0, 0.1 * i], [0.1 * i, 1.0]]), conflicts=i, shared=9)
    for i in range(9)
  }
  scores = {name: {"sql, accuracy": 0.5, "sql, loss": 1.5} for name in (EVIL, "b", "merge")}
  merges.write(root, [EVIL, "b"], layers, scores)
  made["merge"] = root / "merge_report.html"
  made["compare"] = compare.write(compare.read([many(root / "sweep")]), root / "compare.html")
  return made


CHANNELS = list(enumerate(["join", "join", "join", "lookup", "lookup", "lookup"]))


def many(folder):
  """Twenty finished runs of a thousand steps."""
  for i in range(MANY):
    config = copy.deepcopy(runs.CONFIG) | dict(steps=1000)
    config["objective"] = dict(runs.PREFERENCE, beta=(0.03, 0.1, 0.3, 1.0)[i % 4])
    config["adapter"] |= dict(r=4 * 2 ** (i // 4), lora_alpha=8.0 * 2 ** (i // 4))
    answers = [runs.answer(f"Q{k}?", "join", (i + k) % 3 > 0) for k in range(8)]
    lines = runs.preference_rows(1000, 100, seed=i, speed=0.6 + 0.05 * i)
    name = (
      f"adapter=lora__adapter.r={4 * 2 ** (i // 4)}__objective.beta={config['objective']['beta']}"
    )
    done = dict(steps=1000, final={k: v for line in lines for k, v in line.items() if k != "step"})
    runs.write(folder / name, lines=lines, config=config, after=runs.result(answers), done=done)
  return folder


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser, pages):
  """Opens a page and hears what it complains of."""
  complaints, contexts = [], []

  def opened(name, width=1280, scheme="light"):
    context = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
    contexts.append(context)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("request", lambda r: r.url.startswith("file:") or complaints.append(r.url))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(pages[name].as_uri())
    return page

  yield opened
  assert complaints == []
  for context in contexts:
    context.close()


@pytest.mark.parametrize(
  ("width", "scheme"),
  [(1280, "light"), (360, "dark"), slow(1280, "dark"), slow(360, "light")],
)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_read_on_any_screen(name, width, scheme, open_page):
  look = open_page(name, width, scheme).evaluate(LOOK)
  assert look["width"] <= width
  assert (look["back"] < 0.05) == (scheme == "dark")
  assert look["figures"] >= 2
  assert look["outside"] == []
  assert look["overlapping"] == []
  assert look["letters"] >= 9
  assert min(look["text"], look["labels"], look["keys"]) >= 4.5
  assert look["lines"] >= 3


def test_a_runs_box_hides_its_lines_and_its_place_in_the_list_dims_the_others(open_page):
  page = open_page("compare")
  assert page.locator("ul.runs li").count() == MANY
  figures = page.locator("figure:visible").count()
  assert page.locator("figure:visible path.run3").count() == figures
  page.uncheck("#run3")
  assert page.locator("figure:visible path.run3:visible").count() == 0
  page.hover("ul.runs .key5")
  opacity = lambda i: float(
    page.locator(f"figure .run{i}").first.evaluate("e => getComputedStyle(e).opacity")
  )
  assert opacity(4) < 0.2
  assert opacity(5) == 1


def test_links_between_a_runs_pages_lead_there(open_page):
  page = open_page("dpo")
  page.click("text=pairs: margins")
  assert "40 pairs" in page.title()
  page.click("text=report of the run")
  assert page.title() == "dpo"


def test_the_page_of_twenty_runs_is_light(pages):
  assert pages["compare"].stat().st_size < 1_000_000
