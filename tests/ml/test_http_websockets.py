"""WebSockets through real workers, as under uvicorn."""

from __future__ import annotations

import json

import pytest
from http_servers import ASGI, Targets
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

MOST = 100_000


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    # Without keep-alive, which is about requests: their connections are none of its business.
    options = ("--keep-alive", "0", "--access-logfile", "-", "--access-logformat", "%(r)s %(s)s")
    limits = ("--limit-request-fields", "12", "--websocket-max-message-size", str(MOST))
    with Targets(tmp_path_factory, *options, *limits, "--root-path", "/mounted") as made:
        yield made


@pytest.fixture(params=ASGI)
def target(request, servers):
    return servers(request.param)


@pytest.fixture
def socket(target):
    def open_socket(path="/echo", **options):
        host, port = target.address
        return connect(f"ws://{host}:{port}{path}", open_timeout=20, **options)

    return open_socket


def test_text_and_bytes_are_echoed(socket):
    with socket() as ws:
        for message in ("text é", b"\x00\xff", "", b""):
            ws.send(message)
            assert ws.recv(20) == message


def test_a_message_in_fragments(socket):
    with socket() as ws:
        ws.send(iter(["one", "two", "three"]))
        assert ws.recv(20) == "onetwothree"


def test_a_large_message(socket):
    with socket(max_size=None) as ws:
        message = b"x" * MOST
        ws.send(message)
        assert ws.recv(20) == message


def test_a_message_that_is_too_large(socket):
    with socket(compression=None) as ws:
        ws.send(b"x" * (MOST + 1))
        with pytest.raises(ConnectionClosed):
            ws.recv(20)
        assert ws.close_code == 1009


def test_pings_are_answered(socket):
    with socket() as ws:
        assert ws.ping(b"hello").wait(20)


def test_the_app_hears_the_code_of_the_client(target, socket):
    with socket() as ws:
        ws.close(4321)
    target.reaches(lambda state: state["left"] == 4321)


def test_the_client_hears_the_code_of_the_app(socket):
    with socket("/close") as ws:
        with pytest.raises(ConnectionClosed):
            ws.recv(20)
        assert (ws.close_code, ws.close_reason) == (4001, "enough")


def test_a_subprotocol_is_chosen(socket):
    with socket(subprotocols=["one", "two"]) as ws:
        assert ws.subprotocol == "two"


@pytest.mark.parametrize(("path", "status"), [("/reject", 403), ("/deny", 401), ("/fail", 500)])
def test_a_handshake_that_is_refused(target, socket, path, status):
    with pytest.raises(InvalidStatus) as refused:
        socket(path)
    assert refused.value.response.status_code == status
    target.server.logged(rf"(?m)^GET {path} HTTP/1.1 {status}$")


def test_a_handshake_is_logged_when_it_is_answered(target, socket):
    with socket("/logged?a=b"):
        target.server.logged(r"(?m)^GET /logged\?a=b HTTP/1.1 101$")


def test_the_scope(socket):
    with socket("/scope") as ws:
        scheme, client, state, root_path = json.loads(ws.recv(20))
    assert (scheme, client[0], state, root_path) == (
        "ws",
        "127.0.0.1",
        "of the lifespan",
        "/mounted",
    )


def test_a_handshake_with_too_many_fields(socket):
    with pytest.raises(InvalidStatus) as refused:
        socket(additional_headers={f"X-{number}": "x" for number in range(12)})
    assert refused.value.response.status_code == 431
