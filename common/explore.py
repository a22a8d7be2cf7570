"""--explore RUN-or-FILE: a trained generator in the browser, with a slider or field for each of its inputs.

It listens only on 127.0.0.1 and answers two requests: the page, and /draw, a PNG.  It serves no files.
"""

import functools
import io
import math
import os
import re
import signal
import socketserver
import sys
from concurrent.futures import ThreadPoolExecutor
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import torch
from PIL import Image

from common import UserError, log
from common.log import say

ROWS = 16           # random inputs on the page, each with a small picture
MOST = 6            # directions of z, at most


def serve(draws, title, wishes):
    """Serve the page until Ctrl-C.  draws: a Drawer.  wishes: knob name -> initial value as text."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # shells ignore it for background jobs
    try:
        say("finding the directions of z that change the pictures most")
        with Server(draws, title, wishes) as server:
            say(f"http://127.0.0.1:{server.port}/   (Ctrl-C stops it)")
            server.serve_forever()
    except KeyboardInterrupt:
        say("\nended")


class Explorer:
    """Draws pictures of ROWS random inputs, with z moved along directions and knobs set."""

    def __init__(self, draws, wishes):
        self.draws, self.wishes, self.seed = draws, wishes, torch.initial_seed() % 2**32
        self.random = draws.draw(1)
        free = [i for i, (t, knobs) in enumerate(zip(self.random, draws.inputs.values()))
                if t.is_floating_point() and not knobs]
        self.z = free[0] if free else None
        self.directions = directions(draws, self.z) if free else ()
        self.rows = functools.lru_cache(8)(self._rows)

    def _rows(self, seed):
        torch.manual_seed(seed)
        return self.draws.draw(ROWS)

    def picture(self, fields):
        """The PNG that the (name, text) pairs describe: seed and row select a random input; each z is a step
        along a direction in standard deviations; knob.NAME is random if empty.  UserError: a bad value."""
        asked = dict(fields)
        seed = number("seed", asked.get("seed", ""), int, 0, 2**63 - 1)
        row = number("row", asked.get("row", ""), int, 0, ROWS - 1)
        steps = torch.tensor([number("z", text, float, -100, 100) for name, text in fields if name == "z"])
        if len(steps) != len(self.directions):
            raise UserError(f"z {len(steps)} times found: {len(self.directions)} times expected")
        inputs = [t[row:row + 1].clone() for t in self.rows(seed)]
        if len(steps):
            z = inputs[self.z]
            z += (steps @ self.directions).to(z).view(z.shape[1:])
        self.draws.ask(inputs, {k[5:]: text for k, text in asked.items() if k.startswith("knob.") and text})
        torch.manual_seed(seed)     # for generators that draw noise themselves
        x = log.to_uint8(self.draws.pictures(inputs)[0])
        file = io.BytesIO()
        image = Image.fromarray((x[0] if len(x) == 1 else x.permute(1, 2, 0)).numpy())
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()

    def page(self, title):
        """The page as one self-contained HTML text."""
        drawn = self.draws.asked(self.random)[0]
        knobs = [control(knob, self.wishes.get(name, knob.start), drawn[name])
                 for name, (_, _, knob) in self.draws.knobs.items()]
        steps = [slider(f"direction {i + 1}", "z", -3, 3, 0) for i in range(len(self.directions))]
        rows = [f'<button type="button" title="Take z {i + 1}"><img alt=""></button>' for i in range(ROWS)]
        parts = {"TITLE": escape(title), "SEED": str(self.seed), "KNOBS": "".join(knobs),
                 "STEPS": "".join(steps), "ROWS": "".join(rows)}
        return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], PAGE)


def directions(draws, i, pairs=128):
    """The directions of input i that change the pictures most: (at most MOST, size of the input), each one
    standard deviation long.  They are singular vectors of the covariance of z and pictures.

    Each z is paired with its mirror image at the same knob settings, so that the effect of the knobs cancels.
    """
    here = draws.draw(pairs)
    z = here[i].flatten(1)
    mirrored = [2 * z.mean() - t if t is here[i] else t for t in here]
    change = (draws.pictures(here) - draws.pictures(mirrored)).flatten(1).cpu()
    z = (z - z.mean()).float().cpu()
    vectors = torch.linalg.svd(z.T @ change, full_matrices=False)[0].T[:MOST]
    return vectors * (z @ vectors.T).std(0)[:, None]


def number(name, text, kind, low, high):
    """Parse a number.  UserError: not a number, or outside low..high."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{name} {text[:40]!r} found: a number from {low} to {high} expected")
    return value


def control(knob, text, drawn):
    """The HTML control of a knob.  text: initial value; None: the middle, the first category, or `drawn`."""
    name, label = escape("knob." + knob.name), f"<span>{escape(knob.name)}</span>"
    first = None if text is None else knob.shown(torch.as_tensor(knob.value(str(text))))
    if knob.names:
        names = [str(n) for n in knob.names]
        first, few = first or names[0], len(names) <= 12
        mark = [(escape(n), ("checked" if few else "selected") * (n == first)) for n in names]
        if few:
            buttons = "".join(f'<label><input type="radio" name="{name}" value="{n}" {m}>{n}</label>'
                              for n, m in mark)
            return f'<fieldset class="wide"><legend>{label}</legend><div>{buttons}</div></fieldset>'
        options = "".join(f'<option value="{n}" {m}>{n}</option>' for n, m in mark)
        return f'<label>{label}<select name="{name}">{options}</select></label>'
    try:
        if not knob.whole:
            start = (knob.low + knob.high) / 2 if first is None else float(first)
            return slider(knob.name, "knob." + knob.name, min(knob.low, start), max(knob.high, start), start)
    except ValueError:  # its text is not a number
        pass
    return (f'<label class="wide">{label}<input name="{name}" value="{escape(first or drawn)}" '
            'maxlength="1000" placeholder="empty: at random"></label>')


def slider(label, name, low, high, start):
    return (f'<label><span>{escape(label)}<output></output></span><input type="range" name="{escape(name)}" '
            f'min="{low}" max="{high}" value="{start}" step="any"></label>')


class Server(ThreadingHTTPServer):
    """Listens on the first free port of 127.0.0.1 from 8000.

    All drawing happens in one thread, one picture at a time: networks switch modes, and torch creates a pool
    of threads for each thread that computes.
    """

    allow_reuse_address = os.name != "nt"                   # on Windows it would share another program's port
    server_bind = socketserver.TCPServer.server_bind        # HTTPServer's looks up a host name on the network

    def __init__(self, draws, title, wishes):
        for port in (*range(8000, 8100), 0):
            try:
                super().__init__(("127.0.0.1", port), Handler)
                break
            except OSError:
                if not port:
                    raise
        self.port, self.worker = self.server_address[1], ThreadPoolExecutor(1)
        self.explorer = self.worker.submit(Explorer, draws, wishes).result()
        self.page = self.explorer.page(title).encode()

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):      # the page was closed
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    timeout = 60

    def do_GET(self):
        hosts = ([f"{name}:{self.server.port}"] for name in ("127.0.0.1", "localhost"))
        path, _, query = self.path.partition("?")
        if self.headers.get_all("Host") not in hosts:       # DNS rebinding by another site
            self.reply(403, f"open http://127.0.0.1:{self.server.port}/")
        elif path not in ("/", "/draw"):
            self.reply(404, "not found")
        elif path == "/":
            self.reply(200, self.server.page, "text/html; charset=utf-8")
        else:
            fields = parse_qsl(query, keep_blank_values=True)
            try:
                png = self.server.worker.submit(self.server.explorer.picture, fields).result()
                self.reply(200, png, "image/png")
            except UserError as e:
                self.reply(400, " ".join(str(e).split()))

    def reply(self, status, body, kind="text/plain; charset=utf-8"):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store",
                   "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
                   "Content-Security-Policy": POLICY}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the terminal quiet."""


POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
          "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>[[TITLE]]</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #f6f6f4; --card: #fff; --ink: #1d1f23; --soft: #636871;
  --line: #d9d9d5; --blue: #2459c4; --on: #fff; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1e2125; --ink: #e8e8e6;
  --soft: #9aa0a9; --line: #3a3f47; --blue: #8ab4ff; --on: #10131a; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem; background: var(--back); color: var(--ink);
  font: 15px/1.4 system-ui, sans-serif; accent-color: var(--blue) }
h1 { font-size: 1rem; margin: 0 0 1rem; overflow-wrap: anywhere }
form { display: grid; grid-template-columns: 28rem minmax(0, 1fr); gap: 2rem; align-items: start }
#pictures { position: sticky; top: 1.25rem; background: var(--back) }
img { display: block; width: 100%; background: var(--line) }
#one { image-rendering: pixelated }        /* 28rem: a multiple of 28, 32 and 64 pixels */
#rows { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; margin: .5rem 0 }
#rows button { all: unset; cursor: pointer }
#rows [aria-pressed=true] { outline: 3px solid var(--blue); outline-offset: -1px }
#rows img { aspect-ratio: 1 }
#pictures p { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: 0 }
#said { flex: 1; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere }
#said.bad { color: var(--bad); flex-basis: 100%; order: 1 }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin-bottom: 1rem; display: grid; gap: .9rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
section:not(:has(input, select)) { display: none }
h2, .wide { grid-column: 1 / -1 }
h2 { margin: 0; font-size: .85rem; font-weight: 400; color: var(--soft) }
label span { display: flex; justify-content: space-between; gap: 1rem; margin-bottom: .15rem }
output { color: var(--soft); font-variant-numeric: tabular-nums }
[type=range] { display: block; width: 100%; height: 1.5rem; margin: 0 }
p button, select, input:not([type=range], [type=radio]) { font: inherit; color: inherit; width: 100%;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .35rem .7rem }
p button, p [type=number] { width: auto !important }
p [type=number] { max-width: 5rem; margin-left: .4rem }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0 }
legend { padding: 0; margin-bottom: .3rem }
fieldset div { display: flex; flex-wrap: wrap; gap: .35rem }
fieldset label { min-width: 2.3rem; padding: .3rem .6rem; text-align: center; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px }
p button:hover, fieldset label:hover { border-color: var(--blue); cursor: pointer }
fieldset label:has(:checked) { background: var(--blue); border-color: var(--blue); color: var(--on) }
[type=radio] { position: absolute; opacity: 0 }
:focus-visible, #rows :focus-visible, label:has([type=radio]:focus-visible) {
  outline: 2px solid var(--blue); outline-offset: 2px }
@media (max-width: 52rem) {
  body { padding: 0 .75rem .75rem } h1 { margin: .75rem 0 .5rem; font-size: .85rem }
  form { grid-template-columns: minmax(0, 1fr); gap: .5rem }
  #pictures { top: 0; padding: .5rem 0; z-index: 1 } #one { width: min(100%, 34vh); margin: 0 auto } }
</style></head><body><h1>[[TITLE]]</h1><form autocomplete="off">
<div id="pictures"><img id="one" alt="What the generator draws"><div id="rows">[[ROWS]]</div>
<p><span id="said" role="status"></span>
<label>seed<input type="number" name="seed" value="[[SEED]]" min="0"></label>
<button type="button" id="another">New z</button><button type="reset">Reset</button></p></div>
<div><section>[[KNOBS]]</section>
<section><h2>Noise z, moved along its most visible directions, in standard deviations</h2>
[[STEPS]]</section></div></form><script>
const form = document.forms[0], said = document.getElementById("said")
const buttons = [...document.querySelectorAll("#rows button")]
const one = document.getElementById("one"), small = new Set()    // rows whose small pictures are old
let row = 0, large = false, busy = false
function say(text, className = "") { Object.assign(said, {textContent: text, className}) }
async function draw(image, row) {
  const start = performance.now()
  const answer = await fetch("/draw?" + new URLSearchParams([...new FormData(form), ["row", row]]))
  if (!answer.ok) { small.clear(); return say(await answer.text(), "bad") }
  URL.revokeObjectURL(image.src)
  image.src = URL.createObjectURL(await answer.blob())
  await image.decode()
  if (image === one) say(`${(performance.now() - start).toFixed(0)} ms`)
}
async function pump() {     // one request at a time, the large picture first, always with the newest values
  if (busy) return
  busy = true
  try {
    while (large || small.size) {
      const [next] = small
      if (large) { large = false; await draw(one, row) }
      else { small.delete(next); await draw(buttons[next].firstChild, next) }
    }
  } catch { say("no answer: start the program again", "bad") }
  busy = false
}
function changed() {
  for (const label of document.querySelectorAll("label:has(output)"))
    label.querySelector("output").textContent = (+label.querySelector("input").value).toFixed(2)
  buttons.forEach((b, i) => { b.setAttribute("aria-pressed", i === row); small.add(i) })
  large = true
  pump()
}
buttons.forEach((b, i) => b.onclick = () => { row = i; changed() })
document.getElementById("another").onclick = () => { form.seed.value++; row = 0; changed() }
form.oninput = changed
form.onreset = () => { row = 0; setTimeout(changed) }
form.onsubmit = e => e.preventDefault()
changed()
</script></body></html>
"""
