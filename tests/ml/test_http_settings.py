"""gunicorn's settings, for ASGI apps as for WSGI apps: real workers."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gunicorn.config import KNOWN_SETTINGS, Config
from gunicorn_process import ROOT, alive, poll
from http_servers import ALL, ASGI, Target, Targets
from raw_http import Wire

from hornbeam_ml.http.asgi import _ssl_context
from hornbeam_ml.http.settings import IDLE_FOR_ASGI, IDLE_FOR_WSGI

# The access log, statsd, hooks.

FORMAT = (
    "LINE h=%(h)s l=%(l)s u=%(u)s t=%(t)s r=%(r)s s=%(s)s m=%(m)s U=%(U)s q=%(q)s H=%(H)s b=%(b)s "
    "B=%(B)s f=%(f)s a=%(a)s T=%(T)s D=%(D)s M=%(M)s L=%(L)s p=%(p)s "
    "in=%({x-in}i)s out=%({x-out}o)s env=%({http_x_in}e)s length=%({content-length}o)s"
)
HOOKS = """
def pre_request(worker, req):
    worker.log.info("BEFORE %s %s %s %s", req.method, req.path, req.query, req.version)
    if req.path == "/refused":
        raise ValueError("by the hook")

def post_request(worker, req, environ, resp):
    worker.log.info("AFTER %s %s %s", environ["RAW_URI"], resp.status, resp.sent)
    if req.path == "/broken-hook":
        raise ValueError("after the response")
"""


@pytest.fixture(scope="module")
def statsd():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(20)
        yield listener


@pytest.fixture(scope="module")
def logging(tmp_path_factory, statsd):
    """Servers that tell all they can about requests."""
    hooks = tmp_path_factory.mktemp("hooks") / "hooks.py"
    hooks.write_text(HOOKS)
    statsd_options = ("--statsd-host", f"127.0.0.1:{statsd.getsockname()[1]}")
    options = ("--access-logfile", "-", "--access-logformat", FORMAT, "-c", str(hooks))
    with Targets(tmp_path_factory, *options, *statsd_options) as made:
        yield made


@pytest.fixture(params=ALL)
def logged(request, logging):
    """Send a request; return its line in the log."""
    target = logging(request.param)

    def lines():
        return re.findall("LINE .*(?=\n)", target.server.log)

    def send(request, method="GET"):
        before = len(lines())
        with target.wire() as wire:
            wire.send(request)
            response = wire.response(method)
        line = target.server.until(lambda: lines()[before:], "a line")[0]
        return response, dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", line))

    send.target = target
    return send


def test_every_atom_of_the_access_log(logged):
    user = base64.b64encode(b"ann:secret").decode()
    _, line = logged(
        "GET /unread?a=b%20c HTTP/1.1\r\nHost: x\r\nReferer: there\r\nUser-Agent: test\r\n"
        f"X-In: in\r\nX-Forwarded-For: 9.9.9.9\r\nAuthorization: Basic {user}\r\n\r\n"
    )
    fixed = {key: line.pop(key) for key in "tTDMLp"}
    if logged.target.kind == "wsgi":
        line["length"] = "6"  # gunicorn takes this one out of the headers
    assert line == {
        "h": "127.0.0.1",
        "l": "-",
        "u": "ann",
        "r": "GET /unread?a=b%20c HTTP/1.1",
        "s": "200",
        "m": "GET",
        "U": "/unread",
        "q": "a=b%20c",
        "H": "HTTP/1.1",
        "b": "6",
        "B": "6",
        "f": "there",
        "a": "test",
        "in": "in",
        "out": "-",
        "env": "in",
        "length": "6",
    }
    assert re.fullmatch(r"\[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]", fixed["t"])
    assert re.fullmatch(r"\d+\.\d{6}", fixed["L"])
    assert float(fixed["L"]) * 1e6 == pytest.approx(int(fixed["D"]))
    assert int(fixed["M"]) == int(fixed["D"]) // 1000
    assert int(fixed["T"]) == int(fixed["D"]) // 1_000_000
    assert int(fixed["p"].strip("<>")) in logged.target.server.workers()


@pytest.mark.parametrize(
    ("request_line", "status", "sent"),
    [
        ("GET /stream HTTP/1.1", "200", "6"),
        ("GET /no-content HTTP/1.1", "204", "0"),
        ("GET /fail HTTP/1.1", "500", None),
    ],
)
def test_statuses_and_bytes_are_logged(logged, request_line, status, sent):
    _, line = logged(f"{request_line}\r\nHost: x\r\n\r\n")
    assert (line["r"], line["s"]) == (request_line, status)
    assert sent in {None, line["b"]}


def test_the_body_of_a_head_request_is_not_counted(logged):
    _, line = logged("HEAD /unread HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD")
    assert (line["m"], line["b"]) == ("HEAD", "0")


def test_a_client_that_left_is_logged(logging):
    target = logging("httptools")
    with target.wire() as wire:
        wire.send("POST /echo?left HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhe")
    target.server.logged(r"LINE .* r=POST /echo\?left HTTP/1.1 s=499 ")


def test_requests_are_counted_once(logged, statsd):
    statsd.setblocking(False)
    try:
        while statsd.recv(1000):
            pass
    except BlockingIOError:
        statsd.settimeout(20)

    def counted(path, status):
        logged(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
        seen = []
        while not seen or not seen[-1].startswith(f"gunicorn.request.status.{status}:"):
            packet = statsd.recv(1000).decode()
            if packet.startswith("gunicorn.request"):
                seen.append(packet)
        return seen

    counted("/no-content", 204)  # and what earlier tests sent: it is counted after it is logged
    seen = counted("/fail", 500)
    assert re.fullmatch(r"gunicorn\.request\.duration:[\d.]+\|ms", seen[0])
    assert seen[1:] == ["gunicorn.requests:1|c|@1.0", "gunicorn.request.status.500:1|c|@1.0"]


def test_hooks_around_requests(logged):
    logged("GET /unread?hooked HTTP/1.1\r\nHost: x\r\n\r\n")
    logged.target.server.logged(r"BEFORE GET /unread hooked \(1, 1\)")
    logged.target.server.logged(r"AFTER /unread\?hooked 200 OK 6")


def test_hooks_that_fail(logged):
    response, line = logged("GET /refused HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (response.status, line["s"]) == (500, "500")
    assert logged("GET /broken-hook HTTP/1.1\r\nHost: x\r\n\r\n")[0].status == 200
    logged.target.server.logged("Exception in post_request hook")


def test_uvicorn_writes_no_access_log_of_its_own(logging):
    target = logging("httptools")
    with target.wire() as wire:
        assert wire.get("/unread?once").status == 200
    target.server.logged(r"LINE .* q=once")
    assert '"GET /unread?once' not in target.server.log


# Limits and keep-alive.


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    limits = ("--limit-request-line", "50", "--limit-request-fields", "3")
    with Targets(
        tmp_path_factory, *limits, "--limit-request-field_size", "30", "--keep-alive", "0"
    ) as made:
        yield made


STRICT = {
    "fits": ("/" + "a" * 36, ["A: " + "b" * 25, "C: d"], 200),
    "line": ("/" + "a" * 37, [], 414),
    "field": ("/", ["A: " + "b" * 26], 431),
    "fields": ("/", ["A: b"] * 3, 431),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("path", "headers", "status"), [pytest.param(*case, id=name) for name, case in STRICT.items()]
)
def test_limits_are_exact(strict, kind, path, headers, status):
    with strict(kind).wire() as wire:
        assert wire.get(path, *headers).status == status
        assert wire.closed()


@pytest.mark.parametrize("kind", ALL)
def test_no_keep_alive(strict, kind):
    with strict(kind).wire() as wire:
        wire.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n", "bo", "dy")
        response = wire.response()
        assert (response.json()["body"], response.header("connection")) == ("body", "close")
        assert wire.closed()


@pytest.fixture(scope="module")
def boundless(tmp_path_factory):
    limits = ("--limit-request-line", "0", "--limit-request-field_size", "0")
    with Targets(tmp_path_factory, *limits, "--limit-request-fields", "0") as made:
        yield made


@pytest.mark.parametrize("kind", ASGI)
def test_no_limits(boundless, kind):
    with boundless(kind).wire() as wire:
        assert wire.get("/echo?" + "a" * 50_000, *["A: b"] * 1000).status == 200


# Sockets and proxies.

FORWARDED = ("X-Forwarded-For: 1.1.1.1, 6.6.6.6, 10.1.2.3", "X-Forwarded-Proto: https")


@pytest.fixture(scope="module", params=["10.0.0.0/8", "10.0.0.0/8,127.0.0.1", "*"])
def proxied(request, tmp_path_factory):
    """A server on two ports and a Unix socket, and who is trusted."""
    path = tmp_path_factory.mktemp("sockets") / "socket"
    binds = ("-b", "127.0.0.1:0", "-b", f"unix:{path}", "--umask", "0o117")
    with Targets(tmp_path_factory, *binds, "--forwarded-allow-ips", request.param) as made:
        yield made("httptools"), str(path), request.param


def test_several_binds(proxied):
    target, path, _ = proxied
    ports = re.findall(r"http://127\.0\.0\.1:(\d+)", target.server.log)
    assert len(ports) == 2
    for address in (*(("127.0.0.1", int(port)) for port in ports), path):
        with Wire(address) as wire:
            assert wire.get().status == 200
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o660


def test_who_is_trusted_over_tcp(proxied):
    target, _, trusted = proxied
    with target.wire() as wire:
        seen = wire.get("/echo", *FORWARDED).json()
    clients = {"10.0.0.0/8": "127.0.0.1", "10.0.0.0/8,127.0.0.1": "6.6.6.6", "*": "1.1.1.1"}
    assert seen["client"][0] == clients[trusted]
    assert seen["scheme"] == ("http" if trusted == "10.0.0.0/8" else "https")


def test_proxies_on_a_unix_socket_are_trusted(proxied):
    _, path, trusted = proxied
    with Wire(path) as wire:
        seen = wire.get("/echo", *FORWARDED).json()
        plain = wire.get("/echo").json()
    assert seen["client"][0] == ("1.1.1.1" if trusted == "*" else "6.6.6.6")
    assert seen["scheme"] == "https"
    assert (plain["client"], plain["scheme"]) == (None, "http")


def test_workers_may_share_a_port(tmp_path):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        address = taken.getsockname()
        options = ("--reuse-port", "-w", "2", "-b", f"127.0.0.1:{address[1]}")
        with Target("httptools", tmp_path, *options).server as server:
            server.logged(r"(?s)Ready:.*Ready:")
            for _ in range(8):
                with Wire(address) as wire:
                    assert wire.get().status == 200


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost that is its own authority, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", cert),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return str(cert), str(key)


@pytest.fixture(scope="module")
def tls(tmp_path_factory, certificate):
    """A server that wants certificates of its clients, and whose hook allows TLS 1.3 alone."""
    cert, key = certificate
    conf = tmp_path_factory.mktemp("conf") / "conf.py"
    conf.write_text(
        "import ssl\n"
        "def ssl_context(conf, default_ssl_context_factory):\n"
        "    context = default_ssl_context_factory()\n"
        "    context.minimum_version = ssl.TLSVersion.TLSv1_3\n"
        "    return context\n"
    )
    options = ("--certfile", cert, "--keyfile", key, "--ca-certs", cert, "--cert-reqs", "2")
    with Targets(tmp_path_factory, *options, "-c", str(conf)) as made:
        yield made("httptools")


def client_context(certificate, *, shows=True):
    cert, key = certificate
    context = ssl.create_default_context(cafile=cert)
    if shows:
        context.load_cert_chain(cert, key)
    return context


def test_tls(tls, certificate):
    with tls.wire(tls=client_context(certificate)) as wire:
        assert wire.get().json()["scheme"] == "https"
        assert wire.socket.version() == "TLSv1.3"
        assert wire.get("/stream").body == b"onetwo"


def test_clients_that_do_not_close_hold_nobody_up(tls, certificate):
    """A pool of connections never looks at those that are idle, not even for the end of TLS."""
    with tls.wire(tls=client_context(certificate)) as wire:
        assert wire.get().status == 200
        (worker,) = tls.server.workers()
        os.kill(worker, signal.SIGTERM)
        poll(lambda: not alive(worker), "the worker to end", 15)
    tls.server.until(lambda: tls.server.log.count("Ready:") == 2, "another one")


def test_the_ssl_context_hook_counts(tls, certificate):
    context = client_context(certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        tls.wire(tls=context)


def test_clients_without_a_certificate_are_refused(tls, certificate):
    without = client_context(certificate, shows=False)
    with pytest.raises((ssl.SSLError, ConnectionError)), tls.wire(tls=without) as wire:
        wire.get()
    with tls.wire(tls=client_context(certificate)) as wire:
        assert wire.get().status == 200


def test_plain_http_to_a_tls_port_does_no_harm(tls, certificate):
    with tls.wire() as wire:
        wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n").rest()
    with tls.wire(tls=client_context(certificate)) as wire:
        assert wire.get().status == 200


def test_http_2_is_not_offered(certificate, monkeypatch):
    """Even where gunicorn would: clients that chose it would get HTTP/1.1."""
    monkeypatch.setattr("gunicorn.http2.is_http2_available", lambda: True)
    monkeypatch.setattr("gunicorn.sock._get_alpn_protocols", lambda _conf: ["h2", "http/1.1"])
    cfg = Config()
    for name, value in zip(("certfile", "keyfile"), certificate, strict=True):
        cfg.set(name, value)
    cfg.settings["http_protocols"].value = ["h2", "h1"]
    ours, theirs = socket.socketpair()
    client = client_context(certificate)
    client.set_alpn_protocols(["h2", "http/1.1"])
    with ours, theirs, ThreadPoolExecutor() as threads:
        ours.settimeout(20)
        accepted = threads.submit(_ssl_context(cfg, None, None).wrap_socket, ours, server_side=True)
        with client.wrap_socket(theirs, server_hostname="localhost") as connection:
            accepted.result(20).close()
            assert connection.selected_alpn_protocol() == "http/1.1"


# What cannot be honoured.

IDLE = """
workers = 2
threads = 4
worker_connections = 50
proxy_protocol = "auto"
header_map = "refuse"
root_path = "/x"
forwarder_headers = "REMOTE_USER"
keepalive = 5
"""


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "httptools",
            {"threads", "worker_connections", "proxy_protocol", "header_map", "forwarder_headers"},
        ),
        ("wsgi", {"root_path"}),
    ],
)
def test_settings_that_do_nothing_are_named_once(tmp_path, kind, names):
    (tmp_path / "gunicorn.conf.py").write_text(IDLE)
    with Target(kind, tmp_path).server as server:
        server.logged(r"(?s)(Ready:.*){2}")
        found = re.findall(r"\[WARNING\] The setting (\w+) does nothing for", server.log)
        assert sorted(found) == sorted(names)
        server.send(signal.SIGHUP)
        server.logged(r"(?s)(Ready:.*){4}")
        found = re.findall(r"\[WARNING\] The setting (\w+) does nothing for", server.log)
        assert sorted(found) == sorted([*names, *names])


def test_nothing_is_said_about_defaults(strict):
    assert "does nothing" not in strict("httptools").server.log
    assert "does nothing" not in strict("wsgi").server.log


def test_every_setting_is_documented():
    document = (ROOT / "docs" / "settings.md").read_text()
    undocumented = {
        setting.name for setting in KNOWN_SETTINGS if f"`{setting.name}`" not in document
    }
    assert not undocumented
    warned = "".join(line for line in document.splitlines() if "warned" in line)
    assert all(f"`{name}`" in warned for name in IDLE_FOR_ASGI.keys() | IDLE_FOR_WSGI.keys())
