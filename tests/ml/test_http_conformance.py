"""What clients may send and what they get: real workers, exact bytes.

Where uvicorn's parsers differ from what gunicorn publishes, the tables say so. None of the
differences lets a request hide in another one: every connection that stays open answers one more.
"""

from __future__ import annotations

import contextlib
import socket
import struct

import pytest
from gunicorn_process import poll
from http_apps import FLOOD, PIECE
from http_servers import ALL, ASGI, Targets

POST = "POST /echo HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + "Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = "GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with Targets(tmp_path_factory, "--keep-alive", "60") as made:
        yield made


@pytest.fixture(params=ALL)
def target(request, servers):
    return servers(request.param)


@pytest.fixture(params=ASGI)
def asgi(request, servers):
    return servers(request.param)


# What is answered, and what is refused: the statuses, then "open" or "closed".

OK, REFUSED = "200 open", "400 closed"
TWO = "200 200 open"

FRAMING = {
    "no body": (POST + "Content-Length: 0\r\n\r\n", OK),
    "a length": (POST + "Content-Length: 5\r\n\r\nhello", OK),
    "chunks": (CHUNKED + "5\r\nhello\r\n0\r\n\r\n", OK),
    "chunks in capitals": (POST + "Transfer-Encoding: CHUNKED\r\n\r\n5\r\nhello\r\n0\r\n\r\n", OK),
    "a chunk extension": (CHUNKED + "5;a=b\r\nhello\r\n0;c\r\n\r\n", OK),
    "trailers": (CHUNKED + "5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n", OK),
    "a line feed in an extension": (CHUNKED + "5;a\nb\r\nhello\r\n0\r\n\r\n", REFUSED),
    "a chunk size that is none": (CHUNKED + "5x\r\nhello\r\n0\r\n\r\n", REFUSED),
    "a chunk size with 0x": (CHUNKED + "0x5\r\nhello\r\n0\r\n\r\n", REFUSED),
    "a negative chunk size": (CHUNKED + "-5\r\nhello\r\n0\r\n\r\n", REFUSED),
    "a chunk size with a plus": (CHUNKED + "+5\r\nhello\r\n0\r\n\r\n", REFUSED),
    "a chunk that is longer": (CHUNKED + "5\r\nhelloX0\r\n\r\n", REFUSED),
    "length, then chunks": (
        POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        REFUSED,
    ),
    "chunks, then length": (
        POST + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
        REFUSED,
    ),
    "two lengths": (
        POST + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello" + HIDDEN,
        REFUSED,
    ),
    "the same length twice": (
        POST + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        {"h11": OK, "others": REFUSED},
    ),
    "a length with a plus": (POST + "Content-Length: +5\r\n\r\nhello" + HIDDEN, REFUSED),
    "a negative length": (POST + "Content-Length: -5\r\n\r\nhello" + HIDDEN, REFUSED),
    "a length with an underscore": (POST + "Content-Length: 5_0\r\n\r\nhello", REFUSED),
    "an empty length": (POST + "Content-Length: \r\n\r\n" + HIDDEN, REFUSED),
    "no such coding": (
        POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        {"wsgi": "501 closed", "others": REFUSED},
    ),
    "no chunks after all": (
        POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        REFUSED,
    ),
    "identity": (POST + "Transfer-Encoding: identity\r\n\r\n" + HIDDEN, REFUSED),
    "chunked twice": (
        POST + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        REFUSED,
    ),
    "a space before the colon": (
        POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        REFUSED,
    ),
    "a control character": (
        POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        REFUSED,
    ),
    "chunks of HTTP/1.0": (
        CHUNKED.replace("1.1", "1.0") + "0\r\n\r\n" + HIDDEN,
        {"httptools": "200 closed", "h11": "200 closed", "wsgi": REFUSED},
    ),
}

HEADS = {
    "a pipeline": (HIDDEN.replace("hidden", "echo") * 2, TWO),
    "no host": ("GET /echo HTTP/1.1\r\n\r\n", {"h11": REFUSED, "others": OK}),
    "two hosts": (
        "GET /echo HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        {"httptools": OK, "others": REFUSED},
    ),
    "a bad method": ("G@T / HTTP/1.1\r\nHost: x\r\n\r\n", REFUSED),
    "a method in small letters": (
        "get /echo HTTP/1.1\r\nHost: x\r\n\r\n",
        {"h11": OK, "others": REFUSED},
    ),
    "a method of one's own": (
        "FOO /echo HTTP/1.1\r\nHost: x\r\n\r\n",
        {"httptools": REFUSED, "others": OK},
    ),
    "HTTP/1.10": ("GET / HTTP/1.10\r\nHost: x\r\n\r\n", REFUSED),
    "HTTP/x": ("GET / HTTP/x\r\nHost: x\r\n\r\n", REFUSED),
    "HTTP/0.9": ("GET /echo\r\n\r\n", {"httptools": "200 closed", "others": REFUSED}),
    "HTTP/2": (
        "GET /echo HTTP/2.0\r\nHost: x\r\n\r\n",
        {"httptools": "200 closed", "h11": OK, "wsgi": REFUSED},
    ),
    "a space in the URL": ("GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", REFUSED),
    "a URL that is not ASCII": ("GET /é HTTP/1.1\r\nHost: x\r\n\r\n", REFUSED),
    "a URL without a slash": (
        "GET echo HTTP/1.1\r\nHost: x\r\n\r\n",
        {"h11": OK, "others": REFUSED},
    ),
    "OPTIONS *": ("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", OK),
    "CONNECT": (
        "CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        {"wsgi": "200 closed", "others": REFUSED},
    ),
    "TLS": ("\x16\x03\x01\x02\x00\x01\r\n\r\n", REFUSED),
    "a folded field": (
        "GET /echo HTTP/1.1\r\nHost: x\r\nA: 1\r\n 2\r\n\r\n",
        {"h11": OK, "others": REFUSED},
    ),
    "line feeds alone": ("GET /echo HTTP/1.1\nHost: x\n\n", {"h11": OK, "others": REFUSED}),
    "a NUL": ("GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n", REFUSED),
    "a carriage return alone": ("GET / HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n", REFUSED),
    "no colon": ("GET / HTTP/1.1\r\nHost x\r\n\r\n", REFUSED),
    "no name": ("GET / HTTP/1.1\r\nHost: x\r\n: x\r\n\r\n", REFUSED),
    "empty lines first": (
        "\r\n\r\nGET /echo HTTP/1.1\r\nHost: x\r\n\r\n",
        {"httptools": OK, "others": REFUSED},
    ),
    "close": ("GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + HIDDEN, "200 closed"),
    "HTTP/1.0": ("GET /echo HTTP/1.0\r\n\r\n", "200 closed"),
    "HTTP/1.0, kept": (
        "GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        {"wsgi": OK, "others": "200 closed"},
    ),
    "another expectation": (
        POST + "Expect: miracles\r\nContent-Length: 5\r\n\r\nhello",
        {"wsgi": "417 closed", "others": OK},
    ),
    "an upgrade to something else": (
        "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        OK,
    ),
}


@pytest.mark.parametrize(
    ("sent", "expected"),
    [pytest.param(*case, id=name) for name, case in {**FRAMING, **HEADS}.items()],
)
def test_requests_are_answered_or_refused(target, sent, expected):
    if isinstance(expected, dict):
        expected = expected.get(target.kind) or expected["others"]
    *statuses, end = expected.split()
    with target.wire() as wire:
        wire.send(sent)
        assert [wire.response().status for _ in statuses] == list(map(int, statuses))
        if end == "closed":
            assert wire.closed()
        else:
            assert wire.get("/echo?last").json()["query"] == "last"
    assert "/hidden" not in target.state()["paths"]


# What the app gets.


def test_chunks_are_put_together(target):
    with target.wire() as wire:
        wire.send(CHUNKED, "5;x=y\r\nhel", "lo\r\n", "6\r\n world\r\n0\r\n", "X-Trailer: 1\r\n\r\n")
        seen = wire.response().json()
    assert seen["body"] == "hello world"
    assert "x-trailer" not in dict(seen["headers"])


def test_a_head_and_a_body_byte_by_byte(target):
    request = POST + "Content-Length: 5\r\nX-Name: value\r\n\r\nhello"
    with target.wire() as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seen = wire.send(*request).response().json()
    assert seen["body"] == "hello"
    assert dict(seen["headers"])["x-name"] == "value"


def test_headers_keep_their_order_and_their_doubles(asgi):
    with asgi.wire() as wire:
        headers = wire.get("/echo", "B: 2", "A: 1", "b: 3", "A_b: 4").json()["headers"]
    assert headers == [["host", "x"], ["b", "2"], ["a", "1"], ["b", "3"], ["a_b", "4"]]


def test_responses_keep_their_doubles(target):
    with target.wire() as wire:
        headers = wire.get("/cookies").headers
    assert [v for n, v in headers if n == "set-cookie"] == ["a=1", "b=2"]


def test_paths_are_decoded_once(target):
    with target.wire() as wire:
        seen = wire.get("/a%2Fb/%C3%A9%2525/echo?q=%20&r").json()
    assert seen["path"] == "/a/b/é%25/echo"
    assert seen["query"] == "q=%20&r"
    if target.kind != "wsgi":
        assert seen["raw_path"] == "/a%2Fb/%C3%A9%2525/echo"


def test_a_whole_url(target):
    with target.wire() as wire:
        wire.send("GET http://other:80/echo?q=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        seen = wire.response().json()
    # h11 hands the URL on as it is, and so does uvicorn.
    assert seen["path"] == ("http://other:80/echo" if target.kind == "h11" else "/echo")
    assert seen["query"] == "q=1"


def test_an_interim_response_comes_only_when_the_body_is_wanted(asgi):
    expecting = "HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    with asgi.wire() as wire:
        wire.send("POST /echo " + expecting)
        assert wire.response().status == 100
        assert wire.send("hello").response().json()["body"] == "hello"
        assert wire.get().status == 200
    with asgi.wire() as wire:
        wire.send("POST /unread " + expecting)
        assert wire.response().body == b"unread"


def test_an_interim_response_of_wsgi(servers):
    with servers("wsgi").wire() as wire:
        wire.send(POST + "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert wire.response().status == 100
        assert wire.send("hello").response().json()["body"] == "hello"


# What clients get.


def test_head_has_the_length_but_no_body(target):
    with target.wire() as wire:
        response = wire.send("HEAD /unread HTTP/1.1\r\nHost: x\r\n\r\n").response("HEAD")
        assert (response.status, response.header("content-length")) == (200, "6")
        response = wire.send("HEAD /stream HTTP/1.1\r\nHost: x\r\n\r\n").response("HEAD")
        assert (response.status, response.header("content-length")) == (200, None)
        assert wire.get().status == 200


def test_a_stream_is_sent_in_chunks(target):
    with target.wire() as wire:
        response = wire.get("/stream")
        assert (response.header("transfer-encoding"), response.body) == ("chunked", b"onetwo")
        assert wire.get("/unread").body == b"unread"


def test_a_stream_over_http_1_0(target):
    with target.wire() as wire:
        wire.send("GET /stream HTTP/1.0\r\n\r\n")
        response = wire.response()
        # uvicorn over httptools sends chunks, which HTTP/1.0 does not know.
        chunked = "chunked" if target.kind == "httptools" else None
        assert (response.header("transfer-encoding"), response.body) == (chunked, b"onetwo")
        assert wire.closed()


@pytest.mark.parametrize(("path", "status"), [("/no-content", 204), ("/not-modified", 304)])
def test_statuses_without_a_body(target, path, status):
    with target.wire() as wire:
        response = wire.get(path)
        assert (response.status, response.header("transfer-encoding")) == (status, None)
        assert wire.get("/unread").body == b"unread"


def test_an_app_that_fails_at_once(target):
    with target.wire() as wire:
        response = wire.get("/fail")
        assert response.status == 500
        assert b"before the start" not in response.body
        assert response.header("connection") == "close"
        assert wire.closed()
    assert "before the start" in target.server.log


def test_an_app_that_fails_later(target):
    with target.wire() as wire:
        wire.send("GET /fail-late HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = wire.rest()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"begun" in answer
    assert not answer.endswith(b"0\r\n\r\n")


def test_an_app_that_answers_nothing(asgi):
    with asgi.wire() as wire:
        assert wire.get("/nothing").status == 500
    with asgi.wire() as wire:
        wire.send("GET /half HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wire.rest().endswith(b"\r\n\r\nhalf")


def test_a_header_cannot_split_a_response(target):
    with target.wire() as wire:
        wire.send("GET /split HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"set-cookie" not in wire.rest().lower()


def test_a_bad_request_behind_one_that_is_answered(asgi):
    """The answer of the good one comes whole and first."""
    with asgi.wire() as wire:
        wire.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\nG@T / HTTP/1.1\r\n\r\n")
        assert wire.response().body == b"onetwo"
        left = wire.rest()
    assert not left or left.startswith(b"HTTP/1.1 400")


def test_what_never_ends_behind_a_good_request(servers):
    """It is refused once, and the good one gets its answer."""
    target = servers("httptools")
    before = target.server.log.count("Invalid HTTP request received")
    with target.wire() as wire:
        wire.send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        target.reaches(lambda state: state["paths"][-2] == "held")
        for _ in range(20):
            wire.send("a" * 3000)
        with target.wire() as other:
            assert other.get("/go").status == 200
        assert wire.response().status == 200
        wire.rest()
    assert target.server.log.count("Invalid HTTP request received") == before + 1


# Clients that are slow, or leave.


def stands_still(amounts):
    return len(amounts) > 5 and len(set(amounts[-5:])) == 1


def test_an_upload_waits_for_the_app(asgi):
    """Not more of it than some buffers is taken before the app reads."""
    size, piece = 64 << 20, b"x" * 65_536
    with asgi.wire() as wire:
        wire.send(f"POST /hold HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n")
        asgi.reaches(lambda state: "held" in state["paths"])
        wire.socket.setblocking(False)
        sent = 0
        amounts = []

        def waits():
            nonlocal sent
            with contextlib.suppress(BlockingIOError):
                while sent < size:
                    sent += wire.socket.send(piece[: size - sent])
            asgi.state()  # the loop has had its turn
            amounts.append(sent)
            return stands_still(amounts)

        poll(waits, "an upload that waits")
        assert sent < size / 2
        wire.socket.settimeout(20)
        with asgi.wire() as other:
            assert other.get("/go").status == 200
        while sent < size:
            sent += wire.socket.send(piece[: size - sent])
        total, largest = wire.response().json()
    assert total == size
    assert largest < 4 << 20


def test_an_upload_to_wsgi(servers):
    size = 16 << 20
    with servers("wsgi").wire() as wire:
        wire.send(f"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n", b"x" * size)
        assert wire.response().json()[0] == size


def test_a_stream_waits_for_its_reader(asgi):
    with asgi.wire() as wire:
        wire.send("GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        amounts = []

        def waits():
            amounts.append(asgi.state()["flooded"])
            return stands_still(amounts)

        poll(waits, "a stream that waits")
        assert amounts[-1] < 2 * FLOOD / 3
        assert len(wire.response().body) == FLOOD * len(PIECE)


def test_an_app_hears_that_its_client_left(asgi):
    def left(state):
        return state["left"]

    before = left(asgi.state())
    for number, abort in enumerate((False, True), 1):
        wire = asgi.wire().send(POST + "Content-Length: 50\r\n\r\nhello")
        if abort:
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.socket.close()
        asgi.reaches(lambda state, count=before + number: left(state) == count)


@pytest.mark.parametrize(
    "sent", ["", "GET /", "GET / HTTP/1.1\r\nHost: x\r\nA", CHUNKED + "5\r\nhe"]
)
def test_a_client_that_leaves_early_does_no_harm(target, sent):
    log = target.server.log
    with target.wire() as wire:
        wire.send(sent)
    with target.wire() as wire:
        wire.send(
            "GET /flood" if target.kind != "wsgi" else "GET /stream", " HTTP/1.1\r\nHost: x\r\n\r\n"
        )
    with target.wire() as wire:
        assert wire.get().status == 200
    assert "Traceback" not in target.server.log.removeprefix(log)


# Limits; those of these servers are gunicorn's defaults.

LIMITS = {
    "a long line": ("GET /" + "a" * 4090 + " HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    "many fields": ("GET / HTTP/1.1\r\nHost: x\r\n" + "A: b\r\n" * 100 + "\r\n", 431),
    "a long field": ("GET / HTTP/1.1\r\nHost: x\r\nA: " + "b" * 8186 + "\r\n\r\n", 431),
}


@pytest.mark.parametrize(
    ("sent", "status"), [pytest.param(*case, id=name) for name, case in LIMITS.items()]
)
def test_heads_are_limited(target, sent, status):
    with target.wire() as wire:
        assert wire.send(sent).response().status == status
        assert wire.closed()
    with target.wire() as wire:  # in pieces, behind another request
        wire.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wire.response().status == 200
        for start in range(0, len(sent), 1000):
            try:
                wire.send(sent[start : start + 1000])
            except OSError:  # it was refused already
                break
        try:
            assert wire.response().status == status
        except ConnectionError:  # what was still under way took the answer with it
            assert len(sent) > 1000


def test_heads_that_just_fit(target):
    with target.wire() as wire:
        path = "/echo?" + "a" * (4094 - len("GET /echo? HTTP/1.1"))
        assert wire.get(path, *["A: b"] * 98, "C: " + "d" * (8190 - len("C: \r\n"))).status == 200


ENDLESS = {
    "a line": ("GET /", "a", 414),
    "a name": ("GET / HTTP/1.1\r\nHost: x\r\n", "a", 431),
    "a field": ("GET / HTTP/1.1\r\nHost: x\r\nA: ", "a", 431),
    "fields": ("GET / HTTP/1.1\r\nHost: x\r\n", "A: b\r\n", 431),
    "trailers": (CHUNKED + "1\r\nx\r\n0\r\n", "A: b\r\n", 431),
    "a trailer": (CHUNKED + "1\r\nx\r\n0\r\nA: ", "a", 431),
    "an extension": (CHUNKED + "1;a=", "a", 431),
}


@pytest.mark.parametrize(
    ("begin", "more", "status"), [pytest.param(*case, id=name) for name, case in ENDLESS.items()]
)
def test_what_never_ends_is_cut_off(asgi, begin, more, status):
    """After as much as all fields of the head may take together, at the latest."""
    most = 32 << 20
    with asgi.wire() as wire:
        wire.send(begin)
        sent, piece = 0, (more * 10_000)[:6000].encode()
        while sent < most:
            try:
                wire.send(piece)
            except OSError:
                break
            sent += len(piece)
        assert sent < most
        answer = wire.rest()
    assert not answer or answer.startswith((b"HTTP/1.1 %d " % status, b"HTTP/1.1 400 "))


def test_the_workers_went_on_through_all_of_this(target):
    with target.wire() as wire:
        assert wire.get().status == 200
    assert target.server.log.count("Booting worker") == 1
    assert "Fatal error" not in target.server.log
