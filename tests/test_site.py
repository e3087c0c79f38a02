"""The built site in a browser: pages load, say nothing on the console, and fit a phone."""

import json
import re
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

SITE = Path(__file__).parent.parent / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = ("", "getting-started/", "methods/", "tutorials/jump-relu/", "concepts/elbo/", "api/attacks/")

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
listen();
frame.addEventListener("load", () => setTimeout(() => {{
  const root = frame.contentDocument.documentElement;
  document.getElementById("found").textContent = JSON.stringify({{
    title: frame.contentDocument.title, wide: root.scrollWidth, shown: root.clientWidth, said,
  }});
}}, 500));
</script>"""
"""A page that opens another one in a frame as wide as a phone and writes down what it sees."""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, and the probe under ``/probe/<width>/<page>``."""

    def do_GET(self):
        asked = re.fullmatch(r"/probe/(\d+)/(.*)", self.path)
        if asked is None:
            return super().do_GET()
        content = PROBE.format(width=asked[1], page=f"/{asked[2]}").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
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


def look(url, folder):
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
    ]
    answer = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', answer.stdout, re.DOTALL)
    assert found, answer.stderr[-500:]
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


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
