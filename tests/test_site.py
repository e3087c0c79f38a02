"""The built site in a browser: pages load, say nothing on the console, fit a phone, and can be read and searched."""

import html
import json
import re
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from threading import Thread

import pytest

from tests.test_docs import DOCUMENTED

SITE = Path(__file__).parent.parent / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = (
    "",
    "getting-started/",
    "methods/",
    "tutorials/jump-relu/",
    "concepts/elbo/",
    "api/attacks/",
    "sample-report/",
)
REPORT = "assets/sample-report.html"
INDEX = SITE / "search" / "search_index.json"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site; run mkdocs build"),
]

PROBE = """<!doctype html><title>probe</title>
<iframe id="page" src="{page}" width="{width}" height="900"></iframe><pre id="found"></pre><script>
const frame = document.getElementById("page"), said = [];
const listen = () => {{
  const inside = frame.contentWindow;
  inside.addEventListener("error", (e) => said.push(e.message || "failed: " + (e.target.src || e.target.href)), true);
  for (const kind of ["error", "warn"]) inside.console[kind] = (...words) => said.push(words.join(" "));
}};
const rules = {{
  runOnly: ["wcag2a", "wcag2aa"], iframes: false, rules: {{ "scrollable-region-focusable": {{ enabled: false }} }},
}};
const axe = () => new Promise((done) => {{
  const script = frame.contentDocument.createElement("script");
  script.src = "/axe.min.js";
  script.onload = () => frame.contentWindow.axe.run(rules).then((answer) => done(
    answer.violations.flatMap((fault) => fault.nodes.map((node) => `${{fault.id}}: ${{node.html.slice(0, 150)}}`)),
  ));
  frame.contentDocument.head.append(script);
}});
listen();
frame.addEventListener("load", () => setTimeout(async () => {{
  const root = frame.contentDocument.documentElement;
  const dark = frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
  const faults = {axe} ? await axe() : [];
  document.getElementById("found").textContent = JSON.stringify({{
    title: frame.contentDocument.title, wide: root.scrollWidth, shown: root.clientWidth, said, faults, dark,
  }});
}}, 500));
</script>"""
"""A page that opens another one in a frame as wide as a phone and writes down what it sees, and what axe does.

Of the rules one is off that axe made before browsers let the keyboard scroll any region that overflows.
"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, and the probe under ``/probe/<width>/<page>`` or ``/axe/<width>/<page>``."""

    def do_GET(self):
        asked = re.fullmatch(r"/(probe|axe)/(\d+)/(.*)", self.path)
        if asked is not None:
            told = "true" if asked[1] == "axe" else "false"
            return self.answer(
                PROBE.format(width=asked[2], page=f"/{asked[3]}", axe=told).encode(), "text/html"
            )
        if self.path == "/axe.min.js":
            script = resources.files("axe_core_python").joinpath("axe.min.js").read_bytes()
            return self.answer(script, "text/javascript")
        return super().do_GET()

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def look(url, folder, *more):
    """What the probe wrote down."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        f"--user-data-dir={folder}",
        "--window-size=1400,1000",
        "--virtual-time-budget=8000",
        "--dump-dom",
        *more,
    ]
    answer = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', answer.stdout, re.DOTALL)
    assert found, answer.stderr[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_quietly_and_fits(page, width, address, tmp_path):
    found = look(f"{address}/probe/{width}/{page}", tmp_path)
    assert "probdefense" in found["title"]
    assert found["said"] == []
    assert found["wide"] <= found["shown"], "the page scrolls sideways"


def test_the_probe_sees_a_page_that_is_too_wide_and_complains(address, tmp_path):
    bad = SITE / "too-wide.html"
    bad.write_text(
        "<title>bad</title><div style='width: 2000px'>x</div><script>setTimeout(() => console.error('no'), 9)</script>"
    )
    try:
        found = look(f"{address}/probe/390/too-wide.html", tmp_path)
    finally:
        bad.unlink()
    assert found["wide"] > found["shown"]
    assert found["said"] == ["no"]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_sample_report_is_the_commands_and_fits(width, address, tmp_path):
    found = look(f"{address}/probe/{width}/{REPORT}", tmp_path)
    assert found["title"] == "Robustness report: madry, rse, none" and found["said"] == []
    assert found["wide"] <= found["shown"] and (SITE / REPORT).stat().st_size < 500_000


DARK = "--blink-settings=preferredColorScheme=0"


@pytest.mark.parametrize("page", [REPORT, "sample-report/", "getting-started/", "concepts/elbo/"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_fault(page, dark, address, tmp_path):
    """WCAG 2 A and AA: contrast, names of images and regions, order of headings."""
    pytest.importorskip("axe_core_python")
    found = look(f"{address}/axe/390/{page}", tmp_path, *([DARK] if dark else []))
    assert "404" not in found["title"] and found["dark"] == dark
    assert found["faults"] == []


def test_axe_sees_grey_on_grey_and_an_image_without_a_name(address, tmp_path):
    pytest.importorskip("axe_core_python")
    bad = SITE / "faults.html"
    bad.write_text('<html lang="en"><title>bad</title><p style="color: #bbb">grey</p><img src="data:,">')
    try:
        found = look(f"{address}/axe/390/faults.html", tmp_path)
    finally:
        bad.unlink()
    assert {fault.partition(":")[0] for fault in found["faults"]} == {"color-contrast", "image-alt"}


def words(text):
    """As the search takes them apart."""
    separator = json.loads(INDEX.read_text())["config"]["separator"]
    return [word for word in re.split(separator, text.lower()) if word]


def test_the_search_finds_every_public_name():
    """Each name of the reference is a title, and stands in one word, also where a page says ``pd.name(...)``."""
    titles = {}
    for entry in json.loads(INDEX.read_text())["docs"]:
        titles.setdefault(entry["location"].partition("#")[2], []).extend(words(entry["title"]))
    missing = [name for name in DOCUMENTED if name.rpartition(".")[2].lower() not in titles.get(name, [])]
    assert missing == [] and len(DOCUMENTED) > 90
    assert words("pd.with_draws(attack, 4)") == ["pd", "with_draws", "attack", "4"]
