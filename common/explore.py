"""--explore RUN-or-FILE: a trained generator in the browser, with a slider or a field for whatever it takes.

It listens on 127.0.0.1 alone and answers two requests: the page, and /draw, a PNG.  It serves no files.
"""

import functools
import html
import io
import json
import math
import os
import socketserver
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import torch
from einops import rearrange
from PIL import Image

from common import UserError, log
from common.log import say

ROWS, COLUMNS = 16, 8       # random inputs on the page, and how many of them stand side by side
MOST = 6                    # directions of z
LONGEST = 8000              # characters of a request


class Explorer:
    """Draws what the page asks for: ROWS random inputs of a seed, moved along directions of z, with knobs set.

    first: name of each knob -> its value on the page at first, as text.
    """

    def __init__(self, draws, wishes):
        self.draws, self.seed = draws, torch.initial_seed()
        inputs = draws.draw(1)
        self.first = {name: self._first(name, wishes, draws.asked(inputs)[0]) for name in draws.knobs}
        free = [i for i, (t, knobs) in enumerate(zip(inputs, draws.inputs.values()))
                if t.is_floating_point() and not knobs]
        self.z = free[0] if free else None
        self.directions = directions(draws, self.z) if free else torch.zeros(0, 1)
        self.rows = functools.lru_cache(8)(self._rows)

    def _first(self, name, wishes, drawn):
        knob = self.draws.knobs[name][2]
        if name in wishes:
            return knob.shown(torch.as_tensor(knob.value(wishes[name])))
        if knob.start is not None:
            return str(knob.start)
        return str(knob.names[0]) if knob.names else drawn[name] if knob.whole else \
            f"{(knob.low + knob.high) / 2:.4g}"

    def _rows(self, seed):
        torch.manual_seed(seed)
        return self.draws.draw(ROWS)

    def picture(self, fields):
        """The PNG for a request's fields, name -> text.  all: 1 for all rows, else the one that `row` names;
        z: steps along the directions, in standard deviations; knob.NAME: a knob.  UserError: a bad value."""
        seed = number(fields, "seed", int, 0, 2**63 - 1)
        row = number(fields, "row", int, 0, ROWS - 1)
        rows = slice(None) if fields.get("all") == "1" else slice(row, row + 1)
        inputs = [t[rows].clone() for t in self.rows(seed)]
        steps = fields["z"].split(",") if fields.get("z") else []
        if len(steps) != len(self.directions):
            raise UserError(f"{len(steps)} steps of z found: {len(self.directions)} expected")
        if steps:
            steps = torch.tensor([number({"z": text}, "z", float, -100, 100) for text in steps])
            inputs[self.z] += (steps @ self.directions).to(inputs[self.z]).view(inputs[self.z].shape[1:])
        self.draws.ask(inputs, {name[5:]: text for name, text in fields.items() if name.startswith("knob.")})
        torch.manual_seed(seed)     # for a generator with noise of its own
        x = self.draws.pictures(inputs)
        if not x.isfinite().all():
            raise UserError("values this large give no picture")
        array = rearrange(log.to_uint8(x), "(r c) k h w -> (r h) (c w) k", c=COLUMNS if len(x) > 1 else 1).numpy()
        file = io.BytesIO()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def page(self, title):
        """The page, one self-contained text."""
        knobs = []
        for name, (_, _, knob) in self.draws.knobs.items():
            entry = {"name": name, "first": self.first[name]}
            if knob.names:
                entry["names"] = [str(n) for n in knob.names]
            elif not knob.whole:
                entry |= {"low": min(knob.low, float(self.first[name])),
                          "high": max(knob.high, float(self.first[name]))}
            knobs.append(entry)
        setup = {"seed": self.seed % 2**32, "rows": ROWS, "directions": len(self.directions), "knobs": knobs}
        return PAGE.replace("TITLE", html.escape(title)).replace("SETUP", json.dumps(setup).replace("<", "\\u003c"))


def directions(draws, i, pairs=128):
    """The directions of input i, (at most MOST, its size), that move the pictures most, one standard deviation
    long.

    They are the singular vectors of the covariance of z and pictures.  Each z is drawn with its mirror image
    and the same knobs: what the knobs do to the pictures cancels.
    """
    here, there = draws.draw(pairs), None
    z = here[i].flatten(1)
    mean = z.mean()
    there = [2 * mean - t if j == i else t for j, t in enumerate(here)]
    change = (draws.pictures(here) - draws.pictures(there)).flatten(1)
    z = (z - mean).cpu()
    vectors = torch.linalg.svd(z.T @ change.cpu(), full_matrices=False)[0].T[:MOST]
    return vectors * (z @ vectors.T).std(0)[:, None]


def number(fields, name, kind, low, high):
    """The number fields[name].  UserError: none, or outside low..high."""
    text = fields.get(name, "")
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{name} {text[:40]!r} found: a number from {low} to {high} expected")
    return value


class Server(ThreadingHTTPServer):
    """The first free port from 8000 of 127.0.0.1.  All drawing happens in one thread, one picture at a time:
    networks switch modes, and torch keeps a pool of its own for each thread that computes."""

    allow_reuse_address = os.name != "nt"                   # there it would share another program's port
    server_bind = socketserver.TCPServer.server_bind        # HTTPServer's asks the network for a name

    def __init__(self, draws, title, wishes):
        self.worker = ThreadPoolExecutor(1)
        self.explorer = self.worker.submit(Explorer, draws, wishes).result()
        self.page = self.explorer.page(title).encode()
        for port in (*range(8000, 8100), 0):
            try:
                super().__init__(("127.0.0.1", port), Handler)
                break
            except OSError:
                if not port:
                    raise
        self.port = self.server_address[1]

    def server_close(self):
        super().server_close()
        self.worker.shutdown()


class Handler(BaseHTTPRequestHandler):
    timeout = 60

    def do_GET(self):
        hosts = ([f"{name}:{self.server.port}"] for name in ("127.0.0.1", "localhost"))
        path, _, query = self.path.partition("?")
        if self.headers.get_all("Host") not in hosts:       # another site's name for this address
            self.reply(403, f"open http://127.0.0.1:{self.server.port}/")
        elif self.command != "GET" or path not in ("/", "/draw"):
            self.reply(404, "not found")
        elif len(self.path) > LONGEST:
            self.reply(414, f"a request of at most {LONGEST} characters expected")
        elif path == "/":
            self.reply(200, self.server.page, "text/html; charset=utf-8")
        else:
            try:
                fields = dict(parse_qsl(query, keep_blank_values=True))
                png = self.server.worker.submit(self.server.explorer.picture, fields).result()
                self.reply(200, png, "image/png")
            except UserError as e:
                self.reply(400, " ".join(str(e).split()))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_GET

    def reply(self, status, body, kind="text/plain; charset=utf-8"):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
                            "Content-Security-Policy": POLICY}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Keep the terminal quiet."""


def serve(draws, title, wishes):
    """Serve the page until Ctrl-C.  wishes: name of a knob -> its value at first, as text."""
    server = Server(draws, title, wishes)
    say(f"http://127.0.0.1:{server.port}/   (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("\nended")
    finally:
        server.server_close()


POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
          "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #f6f6f4; --card: #fff; --ink: #1d1f23; --soft: #686d76;
  --line: #dcdcd8; --blue: #2459c4; --on: #fff; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1e2125; --ink: #e8e8e6; --soft: #9aa0a9;
  --line: #353a41; --blue: #8ab4ff; --on: #10131a; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem; background: var(--back); color: var(--ink);
  font: 15px/1.4 system-ui, sans-serif; accent-color: var(--blue) }
h1 { font-size: 1rem; font-weight: 600; margin: 0 0 1rem; overflow-wrap: anywhere }
main { display: grid; grid-template-columns: 26rem minmax(0, 1fr); gap: 2rem; align-items: start }
#pictures { position: sticky; top: 1.25rem; background: var(--back) }
img { display: block; width: 100%; image-rendering: pixelated; background: var(--line) }
#all { position: relative; margin-top: .5rem }
#rows { position: absolute; inset: 0; display: grid; grid-template: 1fr 1fr / repeat(8, 1fr) }
#rows button { all: unset; cursor: pointer; border: 2px solid var(--back) }
#rows button[aria-pressed=true] { border-color: var(--blue) }
:focus-visible, #rows button:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px }
#said { min-height: 1.4em; margin: .4rem 0 0; font-size: .85rem; color: var(--soft); overflow-wrap: anywhere }
#said.bad { color: var(--bad) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin-bottom: 1rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .9rem 1.5rem }
section:empty { display: none }
header, .wide { grid-column: 1 / -1 }
header { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center }
header p { flex: 1 1 12rem; margin: 0; color: var(--soft); font-size: .85rem }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0 }
.head { display: flex; justify-content: space-between; gap: 1rem; padding: 0; margin-bottom: .2rem; font-weight: 500 }
output { color: var(--soft); font-variant-numeric: tabular-nums; font-weight: 400 }
input[type=range] { display: block; width: 100%; height: 1.5rem; margin: 0 }
header button, select, input[type=text], input[type=number] { font: inherit; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .35rem .7rem }
select, input[type=text] { width: 100% }
input[type=number] { width: 6.5rem; margin-left: .4rem }
header button { cursor: pointer }
header button:hover, .choices label:hover { border-color: var(--blue) }
.choices { display: flex; flex-wrap: wrap; gap: .35rem }
.choices label { position: relative; min-width: 2.3rem; padding: .3rem .6rem; text-align: center; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px }
.choices label:has(:checked) { background: var(--blue); border-color: var(--blue); color: var(--on) }
.choices label:has(:focus-visible) { outline: 2px solid var(--blue); outline-offset: 1px }
.choices input { position: absolute; opacity: 0 }
@media (max-width: 52rem) {
  body { padding: 0 .75rem .75rem } h1 { margin: .75rem 0 .5rem; font-size: .85rem }
  main { grid-template-columns: minmax(0, 1fr); gap: .5rem }
  #pictures { top: 0; padding: .5rem 0 .25rem; z-index: 1 } #one { width: min(100%, 34vh); margin: 0 auto } }
</style></head><body>
<h1>TITLE</h1>
<main><div id="pictures"><img id="one" alt="The picture that the generator draws">
<div id="all"><img id="sixteen" alt=""><div id="rows"></div></div><p id="said" role="status"></p></div>
<form><section id="knobs"></section><section id="z"><header><p id="about"></p>
<label>seed<input type="number" id="seed" min="0" step="1"></label><button type="button" id="anew">New z</button>
<button type="button" id="reset">Reset</button></header></section></form></main>
<script>
const setup = SETUP, $ = id => document.getElementById(id), knobs = [], steps = []
let row = 0, busy = false, wanted = false, wantedAll = false, slow = 0, timer
function make(parent, tag, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties)) }
function slider(parent, name, low, high, first) {       // -> a function that gives its value
  const label = make(parent, "label"), head = make(label, "span", {className: "head"})
  make(head, "span", {textContent: name})
  const shown = make(head, "output"), input = make(label, "input", {type: "range", min: low, max: high, step: "any"})
  input.setAttribute("value", first)                    // what a reset goes back to
  const show = () => { shown.textContent = (+input.value).toFixed(2) }
  input.oninput = show; input.onreset = show; show(); input.ondblclick = () => { input.value = first; show(); changed() }
  return Object.assign(() => input.value, {show}) }
function choice(parent, name, names, first) {
  if (names.length > 12) {
    const label = make(parent, "label"), select = make(label, "select")
    label.prepend(Object.assign(document.createElement("span"), {className: "head", textContent: name}))
    for (const n of names) make(select, "option", {value: n, textContent: n, defaultSelected: n === first})
    return () => select.value }
  const set = make(parent, "fieldset", {className: "wide"})
  make(set, "legend", {className: "head", textContent: name})
  const row = make(set, "div", {className: "choices"})
  for (const n of names) { const label = make(row, "label")
    make(label, "input", {type: "radio", name: "knob " + name, value: n, defaultChecked: n === first})
    label.append(n) }
  return () => set.querySelector(":checked").value }
function text(parent, name, first) {
  const label = make(parent, "label", {className: "wide"})
  make(label, "span", {className: "head", textContent: name})
  const input = make(label, "input", {type: "text", defaultValue: first, placeholder: "empty: one at random each",
    autocomplete: "off", maxLength: 1000})
  return () => input.value }
for (const k of setup.knobs) knobs.push([k.name, k.names ? choice($("knobs"), k.name, k.names, k.first)
  : "low" in k ? slider($("knobs"), k.name, k.low, k.high, k.first) : text($("knobs"), k.name, k.first)])
for (let i = 1; i <= setup.directions; i++) steps.push(slider($("z"), "z along direction " + i, -3, 3, 0))
$("about").textContent = setup.directions ? "The directions of z that change pictures most, in standard deviations." : ""
$("seed").defaultValue = setup.seed
for (let i = 0; i < setup.rows; i++) make($("rows"), "button", {type: "button", title: "Take this z",
  ariaLabel: "Take z number " + (i + 1), onclick: () => { row = i; changed() }})
async function draw(all) {
  const q = new URLSearchParams({seed: $("seed").value, row, z: steps.map(s => s()), all: +all})
  for (const [name, value] of knobs) if (value() !== "") q.append("knob." + name, value())
  const start = performance.now(), image = $(all ? "sixteen" : "one")
  const answer = await fetch("/draw?" + q), ok = answer.ok
  if (!ok) return say(await answer.text(), true)
  const old = image.src
  image.src = URL.createObjectURL(await answer.blob()); await image.decode(); URL.revokeObjectURL(old)
  const ms = performance.now() - start
  if (all) slow = ms; else say(`Drawn in ${ms.toFixed(0)} ms`) }
function say(text, bad = false) { $("said").textContent = text; $("said").className = bad ? "bad" : "" }
async function pump() {                                 // one request at a time; the newest values win
  if (busy) return
  busy = true
  try { while (wanted || wantedAll) { const all = !wanted; wanted = false; if (all) wantedAll = false
    await draw(all) } }
  catch { say("No answer: start the program again.", true); wanted = wantedAll = false }
  busy = false }
function changed() {
  [...$("rows").children].forEach((b, i) => b.setAttribute("aria-pressed", i === row))
  wanted = true; wantedAll = slow < 60; clearTimeout(timer)     // a slow generator draws all when the sliders rest
  if (!wantedAll) timer = setTimeout(() => { wantedAll = true; pump() }, 250)
  pump() }
const form = document.forms[0]
form.oninput = changed; form.onsubmit = e => e.preventDefault()
$("anew").onclick = () => { $("seed").value = (+$("seed").value || 0) + 1; row = 0; changed() }
$("reset").onclick = () => { form.reset(); row = 0; for (const s of [...steps, ...knobs.map(k => k[1])]) s.show?.(); changed() }
changed()
</script></body></html>
"""
