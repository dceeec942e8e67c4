"""The bytes of the local transport: sound ones arrive whole, others end in a clear error."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_helpers import Answers, ServerThread, ask, eventually

from hornbeam_state import codec
from hornbeam_state.errors import CodecError, ConfigError, HornbeamError, NodeDown
from hornbeam_state.transports.local import connect, frames, messages
from hornbeam_state.transports.local.frames import Frame, FrameReader
from hornbeam_state.transports.local.messages import Kind
from hornbeam_state.transports.local.outbox import Outbox

HEADER = struct.Struct("<4sB3xIQQ")
PREFIX = b"hb\x01\x08"
PARTS = st.lists(st.one_of(st.binary(max_size=50), st.integers(0, 200_000).map(bytes)), max_size=5)


def bytes_of(frame):
    return b"".join(frame.buffers)


def feed(reader, data, sizes=None):
    """Return what a reader makes of some bytes that arrive in pieces of these sizes."""
    received, position = [], 0
    sizes = iter(sizes or ())
    while position < len(data):
        buffer = reader.buffer()
        count = min(len(buffer), len(data) - position, next(sizes, len(data)))
        buffer[:count] = data[position : position + count]
        position += count
        for frame in reader.feed(count):
            received.append((frame.kind, frame.call, [bytes(part) for part in frame.parts]))
    return received


@given(st.lists(PARTS, max_size=6), st.lists(st.integers(1, 90_000)))
@settings(deadline=None)
def test_frames_arrive_whole_in_whatever_pieces(contents, sizes):
    data = b"".join(
        bytes_of(Frame(number % 256, number, [[part] for part in parts]))
        for number, parts in enumerate(contents)
    )
    expected = [(number % 256, number, parts) for number, parts in enumerate(contents)]
    assert feed(FrameReader(), data, sizes) == expected


@given(st.binary(max_size=400), st.booleans())
@settings(deadline=None)
def test_any_bytes_are_frames_or_a_clear_error(data, after_prefix):
    with contextlib.suppress(CodecError, ConfigError):
        feed(FrameReader(1000), (PREFIX if after_prefix else b"") + data)


@given(st.data())
@settings(deadline=None)
def test_a_damaged_frame_is_read_as_a_frame_or_refused(data):
    sound = bytearray(bytes_of(Frame(2, 7, [[b"abc"], [b"d" * 40], [b""]])))
    for _ in range(data.draw(st.integers(1, 3))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError, ConfigError):
        feed(FrameReader(10_000), bytes(sound))


def test_no_memory_is_taken_for_what_is_only_announced():
    reader = FrameReader(2**20)
    with pytest.raises(CodecError, match="1048576 are the most"):
        feed(reader, HEADER.pack(PREFIX, 2, 1, 1, 2**50))
    with pytest.raises(CodecError, match="too many parts"):
        feed(FrameReader(), HEADER.pack(PREFIX, 2, 2**20, 1, 2**29))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert feed(FrameReader(), HEADER.pack(PREFIX, 2, 1, 1, 2**30)) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


@pytest.mark.parametrize("lengths", [(5,), (3,), (2**63, 2**63 + 4), (4, 0)])
def test_lengths_that_do_not_add_up_are_refused(lengths):
    body = struct.pack(f"<{len(lengths)}Q", *lengths) + b"abcd"
    data = HEADER.pack(PREFIX, 2, len(lengths), 1, len(body) + (lengths == (4, 0))) + body
    with pytest.raises(CodecError, match="its length"):
        feed(FrameReader(), data + b"x")


def test_another_version_is_named():
    with pytest.raises(ConfigError, match=r"version 9 .*version 5 .* 1 with 8"):
        feed(FrameReader(), HEADER.pack(b"hb\x09\x05", 1, 0, 0, 0))
    with pytest.raises(CodecError, match="no frame"):
        feed(FrameReader(), b"GET / HTTP/1.1\r\n")
    with pytest.raises(CodecError, match="no frame"):
        feed(FrameReader(), b"G")


def test_more_values_than_a_frame_holds_are_refused():
    with pytest.raises(CodecError, match="the most in a message"):
        Frame(2, 1, [[b""]] * (frames.MOST_PARTS + 1))


def test_an_array_is_not_copied_on_its_way_into_the_socket():
    array = np.zeros(100_000)
    frame = messages.call(Kind.CALL, 1, ask("echo", array, b"x" * 50_000))
    addresses = [np.frombuffer(one, np.uint8).ctypes.data for one in frame.buffers]
    assert array.ctypes.data in addresses
    assert len(frame.buffers) == 4


@given(st.lists(PARTS, min_size=1, max_size=8), st.integers(1, 9000))
@settings(max_examples=30, deadline=None)
def test_an_outbox_sends_everything_in_order(contents, most):
    class Taker:
        """A socket that takes a few bytes at a time."""

        data = b""

        def sendmsg(self, buffers, _ancillary, _flags):
            taken = b"".join(map(bytes, buffers))[:most]
            self.data += taken
            return len(taken)

    taker, outbox, expected = Taker(), Outbox(), b""
    for number, parts in enumerate(contents):
        frame = Frame(1, number, [[part] for part in parts])
        expected += bytes_of(frame)
        outbox.push(frame)
    while not outbox.flush(taker):
        pass
    assert taker.data == expected
    assert outbox.bytes == 0


# Against a real server.


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "host.sock"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerThread(tmp_path_factory.mktemp("frames") / "own" / "host.sock") as running:
        yield running


def dial(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def read_all(sock):
    """Return the frames that arrive until the other side closes."""
    reader, received = FrameReader(), []
    while True:
        try:
            count = sock.recv_into(reader.buffer())
        except ConnectionResetError:
            return received
        if not count:
            return received
        for frame in reader.feed(count):
            error = messages.read_failure(frame) if frame.kind in (17, 22) else None
            received.append((Kind(frame.kind), error))


HELLO = bytes_of(messages.greeting(Kind.HELLO, 2**20, {}))
CALL = bytes_of(messages.call(Kind.CALL, 1, ask("hang", label="raw")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", "no frame", id="http"),
        pytest.param(b"hb\x63\x08" + HELLO[4:], "version 99", id="protocol"),
        pytest.param(b"hb\x01\x09" + HELLO[4:], "version 9 of the codec", id="codec"),
        pytest.param(CALL, "begins with a greeting", id="no greeting"),
        pytest.param(HEADER.pack(PREFIX, 1, 1, 0, 10**6), "65536 are the most", id="large"),
        pytest.param(bytes_of(Frame(1, 0, [[b"\x80"]])), "damaged", id="damaged greeting"),
        pytest.param(bytes_of(Frame(1, 0)), "no greeting", id="empty greeting"),
        pytest.param(HELLO + bytes_of(Frame(99, 1)), "kind 99", id="kind"),
        pytest.param(HELLO + HELLO, "kind 1", id="second greeting"),
        pytest.param(HELLO + CALL + CALL, "number of another", id="same number"),
        pytest.param(HELLO + HEADER.pack(PREFIX, 2, 1, 1, 2**40), "are the most", id="too large"),
    ],
)
def test_a_client_that_makes_no_sense_is_told_and_closed(server, data, message):
    with dial(server.path) as sock:
        sock.sendall(data)
        received = read_all(sock)
    kind, error = received[-1]
    assert kind is Kind.REFUSAL
    assert isinstance(error, HornbeamError)
    assert message in str(error)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([], id="nothing"),
        pytest.param([[b"\xff"]], id="no value"),
        pytest.param([[codec.encode(["a", "b"])]], id="no call"),
        pytest.param([[codec.encode(["a", "b", {}, "soon"])]], id="timeout"),
        pytest.param([[codec.encode(["a", "echo", {}, 1.0])], [b"\x80\xc1"]], id="argument"),
    ],
)
def test_a_call_that_makes_no_sense_fails_alone(server, parts):
    with dial(server.path) as sock:
        sock.sendall(HELLO + bytes_of(Frame(Kind.CALL, 1, parts)))
        sock.shutdown(socket.SHUT_WR)
        received = read_all(sock)
    assert [kind for kind, _ in received] == [Kind.WELCOME, Kind.FAILURE]
    assert isinstance(received[-1][1], CodecError)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), greets=st.booleans(), framed=st.booleans())
def test_a_server_survives_any_bytes(server, data, greets, framed):
    if framed:
        data = (
            HEADER.pack(PREFIX, data[0] % 32 if data else 2, 1, 1, 8 + len(data))
            + struct.pack("<Q", len(data))
            + data
        )
    with dial(server.path) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall((HELLO if greets else b"") + data)
            sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    with contextlib.closing(connect(server.path, {})) as channel:
        assert channel.call(ask("echo", 1)) == [1]


def test_a_client_that_says_nothing_is_closed(path, monkeypatch):
    monkeypatch.setattr("hornbeam_state.transports.local.connection._GREETING_WAIT_S", 0.05)
    with ServerThread(path), dial(path) as sock:
        assert sock.recv(1) == b""


class Impostor:
    """A server that says what it is told, for the length of a block."""

    def __init__(self, path, *answers) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        sock, _ = self._listener.accept()
        with sock:
            for answer in self._answers:
                sock.recv(65536)
                sock.sendall(answer)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._thread.join()
        self._listener.close()


WELCOME = bytes_of(messages.greeting(Kind.WELCOME, 2**20, {"i": "am"}))


@pytest.mark.parametrize(
    ("answer", "type", "message"),
    [
        pytest.param(b"HTTP/1.1 400\r\n", ConfigError, "no server of hornbeam", id="http"),
        pytest.param(
            b"hb\x02\x08" + WELCOME[4:], ConfigError, "version 2 .*1 with 8", id="version"
        ),
        pytest.param(HEADER.pack(PREFIX, 16, 1, 0, 10**6), ConfigError, "no server", id="large"),
        pytest.param(WELCOME[:20], NodeDown, "closed the connection", id="cut"),
        pytest.param(b"", NodeDown, "closed the connection", id="nothing"),
    ],
)
def test_a_server_that_makes_no_sense_is_refused(path, answer, type, message):
    with Impostor(path, answer), pytest.raises(type, match=message):
        connect(path, {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(b"nonsense", "no frame of hornbeam", id="nonsense"),
        pytest.param(bytes_of(Frame(2, 1)), "none of kind 2", id="kind"),
        pytest.param(bytes_of(Frame(18, 0, [[b"\xff"]])), "not written by hornbeam", id="note"),
        pytest.param(
            bytes_of(messages.failure(Kind.REFUSAL, 0, ConfigError("you said nonsense"))),
            "you said nonsense",
            id="refusal",
        ),
        pytest.param(HEADER.pack(PREFIX, 19, 1, 1, 2**50), "are the most", id="large"),
        pytest.param(WELCOME[:30], "closed", id="cut"),
    ],
)
def test_answers_that_make_no_sense_end_the_connection(path, answer, message):
    with Impostor(path, WELCOME, answer), contextlib.closing(connect(path, {})) as channel:
        with pytest.raises(NodeDown, match=message):
            channel.call(ask("echo"))
        assert not channel.connected


def test_an_answer_with_a_damaged_value_fails_that_call(path):
    answer = bytes_of(Frame(Kind.RESULTS, 1, [[b"\xff"]])) + bytes_of(messages.results(2, ["fine"]))
    with Impostor(path, WELCOME, answer), contextlib.closing(connect(path, {})) as channel:
        first = channel.submit(ask("echo"))
        with pytest.raises(CodecError):
            first.result(20)


def test_two_servers_that_start_at_once_do_not_take_each_others_place(path):
    """One of them listens in the end, and the other was refused, whatever a dead one left."""
    path.parent.mkdir(mode=0o700)

    def start(begin):
        server = ServerThread(path, Answers())
        begin.wait()
        try:
            return server.__enter__()
        except ConfigError:
            return None

    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        with ThreadPoolExecutor(2) as pool:
            started = list(pool.map(start, [threading.Barrier(2)] * 2))
        (running,) = filter(None, started)
        with contextlib.closing(connect(path, {})) as channel:
            assert channel.call(ask("echo", 1)) == [1]
        running.__exit__()
        assert not Path(path).exists()


def test_a_lost_client_leaves_no_call_behind(server):
    with dial(server.path) as sock:
        sock.sendall(HELLO + CALL)
        eventually(lambda: "raw began" in server.handler.events)
        time.sleep(0.01)
    eventually(lambda: not server.running())
