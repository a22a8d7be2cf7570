"""The page of --explore over a real socket: fields, pictures, refusals, and a run and a file in a browser's
place."""

import http.client
import io
import re
import signal
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image
from torch import nn

from common import explore
from common.export import Drawer, Knob

NAMES = ("T-shirt/top", "<b>\"bag\"&</b>", "boot")
MEAN, STD = torch.tensor([0.2, -0.1]), torch.tensor([0.5, 2.0])


def attribute(name, j):
    return Knob(name, -1.0, 1.0, read=lambda text: (float(text) - MEAN[j].item()) / STD[j].item(),
                tell=lambda v: f"{(v * STD[j] + MEAN[j]).item():.3g}")


def read_text(text):
    if not text.isascii():
        raise ValueError("plain letters")
    return list(text.encode()[:201].ljust(201, b" "))


PROMPT = Knob("prompt", whole=True, read=read_text, tell=lambda row: bytes(row.tolist()).decode().strip())
KINDS = {   # knobs of each input after z, and how to draw n rows of it
    "z": {},
    "label": {"label": ([Knob("label", names=NAMES, whole=True)], lambda n: torch.randint(3, (n,)))},
    "codes": {"c": ([Knob("c1", names=tuple(range(20))), Knob("c2", names=(0, 1))],
                    lambda n: torch.randint(2, (n, 2))),
              "u": ([Knob("c3", -2.0, 2.0)], lambda n: torch.rand(n, 1))},
    "attributes": {"y": ([attribute("smiling", 0), attribute("hat <3", 1)], lambda n: torch.randn(n, 2))},
    "text": {"t": ([PROMPT], lambda n: torch.randint(97, 123, (n, 201), dtype=torch.uint8))},
}
MOVED = {"label": {"label": "boot"}, "codes": {"c1": "11", "c2": "1", "c3": "1.25"}, "z": {},
         "attributes": {"smiling": "-1", "hat <3": "0.5"}, "text": {"prompt": "a small red circle"}}


def drawer(kind, size=8):
    """A generator of grey pictures that depend on all of its inputs."""
    parts = KINDS[kind]
    torch.manual_seed(1)
    net = nn.Linear(5 + sum(draw(1).numel() for _, draw in parts.values()), size * size)
    nn.init.normal_(net.weight, 0.0, 0.3)

    def function(*inputs):
        columns = [t.float().reshape(len(t), -1) / (1 if t.is_floating_point() else 100) for t in inputs]
        return net(torch.cat(columns, 1)).sigmoid().view(-1, 1, size, size)

    return Drawer(function, lambda n: (torch.randn(n, 5, 1), *(draw(n) for _, draw in parts.values())),
                  {"G": net}, {"z": []} | {name: knobs for name, (knobs, _) in parts.items()})


class Form(HTMLParser):
    """What a browser sends for the page as it comes: (name, value) pairs."""

    def __init__(self, page):
        super().__init__()
        self.fields, self.select = [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if tag == "select":
            self.select = a["name"]
        if tag == "option" and "selected" in a:
            self.fields.append((self.select, a["value"]))
        if tag == "input" and (a.get("type") != "radio" or "checked" in a):
            self.fields.append((a["name"], a["value"]))
        assert tag not in ("iframe", "object") and "src" not in a and "//" not in a.get("href", "")


@pytest.fixture
def serve():
    """serve(draws, wishes) -> get(path, host, method): (status, bytes)."""
    servers = []

    def start(draws, wishes=None):
        torch.manual_seed(7)
        server = explore.Server(draws, "test.py: <run>", wishes or {})
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)

        def get(path, host=None, method="GET"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.port}"})
            answer = connection.getresponse()
            return answer.status, answer.read()

        get.port = server.port
        return get

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def form(get):
    status, page = get("/")
    assert status == 200
    return [*Form(page.decode()).fields, ("row", "0")]


def draw(get, fields, **other):
    """The request's answer, with some fields changed."""
    changed = [(k, other.pop(k, v)) for k, v in fields]
    return get("/draw?" + urlencode(changed + list(other.items())))


def pixels(answer):
    status, png = answer
    assert status == 200, png
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_the_page_moves_the_picture(serve, kind):
    get = serve(drawer(kind))
    fields = form(get)
    answer = draw(get, fields)
    one = pixels(answer)
    assert one.shape == (8, 8) and draw(get, fields) == answer
    knobs = {k: v for k, v in fields if k.startswith("knob.")}
    assert {k[5:] for k in knobs} == set(MOVED[kind])
    for name, text in MOVED[kind].items():
        key = "knob." + name
        assert not np.array_equal(pixels(draw(get, fields, **{key: text})), one), name
        assert np.array_equal(pixels(draw(get, fields, **{key: knobs[key]})), one), name
    for i in (i for i, (k, _) in enumerate(fields) if k == "z"):
        moved = [*fields[:i], ("z", "2"), *fields[i + 1:]]
        assert not np.array_equal(pixels(draw(get, moved)), one)
    assert sum(k == "z" for k, _ in fields) == 5
    for change in ({"row": "3"}, {"seed": "8"}):
        assert not np.array_equal(pixels(draw(get, fields, **change)), one)


def test_wishes_are_the_first_values(serve):
    get = serve(drawer("codes"), {"c1": "13", "c3": "3.5"})
    fields = dict(form(get))
    assert (fields["knob.c1"], fields["knob.c2"], float(fields["knob.c3"])) == ("13", "0", 3.5)
    assert float(dict(form(serve(drawer("attributes"), {"smiling": "0.25"})))["knob.smiling"]) == 0.25
    text = 'a "blue" <square>'
    assert dict(form(serve(drawer("text"), {"prompt": text})))["knob.prompt"] == text


def test_an_empty_text_leaves_random_ones(serve):
    get = serve(drawer("text"))
    fields = form(get)
    some = pixels(draw(get, fields, **{"knob.prompt": ""}))
    assert not np.array_equal(some, pixels(draw(get, fields)))
    assert np.array_equal(some, pixels(draw(get, [f for f in fields if f[0] != "knob.prompt"])))


def test_the_first_direction_is_the_one_that_moves_pictures_most():
    torch.manual_seed(0)
    draws = drawer("z")
    with torch.no_grad():
        draws.nets["G"].weight.mul_(torch.tensor([0.1, 0.1, 1.0, 0.1, 0.1]))
    found = explore.directions(draws, 0)
    assert found.shape == (5, 5)
    assert abs(found[0, 2]) > 0.95 and found[0].norm().item() == pytest.approx(1, abs=0.2)


def test_refusals_are_one_line(serve):
    get = serve(drawer("codes"))
    fields = form(get)
    for change in ({"knob.c1": "77"}, {"knob.c3": "nan"}, {"knob.c3": "much"}, {"knob.c3": "1e300"},
                   {"knob.c9": "1"}, {"seed": "-1"}, {"seed": "9" * 5000}, {"row": "16"}, {"z": "inf"},
                   {"z": ""}):
        status, body = draw(get, fields, **change)
        assert status == 400 and 10 < len(body) < 300 and b"\n" not in body, change
        assert next(iter(change)).removeprefix("knob.").encode() in body or b"too large" in body
    assert draw(get, [f for f in fields if f[0] != "z"])[0] == 400 == get("/draw")[0]
    assert draw(get, fields)[0] == 200
    get = serve(drawer("text"))
    assert draw(get, form(get), **{"knob.prompt": "caf\u00e9"})[1].endswith(b"plain letters")


def test_it_serves_nothing_else_and_nobody_else(serve):
    get = serve(drawer("z"))
    for path in ("/README.md", "/../README.md", "//etc/passwd", "/draw/", "/index.html", "/page"):
        assert get(path) == (404, b"not found"), path
    for method in ("POST", "PUT", "DELETE"):
        assert get("/draw", method=method)[0] == 501
    for host in ("evil.example", f"evil.example:{get.port}", "127.0.0.1", f"127.0.0.1:{get.port + 1}"):
        for path in ("/", "/draw", "/README.md"):
            status, body = get(path, host=host)
            assert status == 403 and b"form" not in body
    assert get("/", host=f"localhost:{get.port}")[0] == 200
    with socket.create_connection(("127.0.0.1", get.port), 20) as s:    # a huge body is not read
        head = f"POST /draw HTTP/1.1\r\nHost: 127.0.0.1:{get.port}\r\nContent-Length: 9999999999\r\n\r\n"
        s.sendall(head.encode())
        assert b" 501 " in s.recv(100)


def test_a_second_page_takes_another_port_and_draws_the_same(serve):
    a, b = serve(drawer("label")), serve(drawer("label"))
    assert a.port != b.port
    fields = form(a)
    assert draw(b, fields, seed="99") != draw(a, fields) == draw(b, fields)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_a_run_and_a_file_are_explored_until_ctrl_c(tmp_path, digits):
    words = ("--dataset", digits, "--steps", "1", "--gan-steps", "0", "--width", "0.05", "--batch-size", "16")
    folders = ("--out", tmp_path, "--data-dir", tmp_path)
    assert script("infogan.py", *words, *folders).returncode == 0
    run, file = tmp_path / "infogan-digits", tmp_path / "g.npz"
    result = script("infogan.py", "--resume", run, "--export", file)
    assert result.returncode == 0, result.stderr
    pages = [subprocess.Popen([sys.executable, "infogan.py", "--explore", what, "--set", "c1=3"], cwd=ROOT,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for what in (run, file)]
    answers = []
    for page in pages:
        url = next(line for line in page.stdout if line.startswith("http"))
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/", url)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        fields = Form(connection.getresponse().read().decode()).fields
        assert ("knob.c1", "3") in fields
        connection.request("GET", "/draw?" + urlencode([*fields, ("row", 0)]))
        answers.append(pixels((200, connection.getresponse().read())).astype(int))
        page.send_signal(signal.SIGINT)
        out, err = page.communicate(timeout=20)
        assert (page.returncode, out.strip(), err) == (0, "ended", "")
    assert answers[0].shape == (28, 28) and abs(answers[0] - answers[1]).max() <= 16    # bfloat16
