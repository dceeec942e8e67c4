"""Nodes and what somebody else put into their streams; and what callers may not have."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import pytest
from peers import LONG_MS, Peer, Runs
from processes import wait_until
from redis_servers import Server

from hornbeam_state import codec
from hornbeam_state.transports.redis.bodies import Body
from hornbeam_state.transports.redis.envelope import Envelope, Kind, digest_of, sign_head
from hornbeam_state.transports.redis.keys import NodeKeys

SECRET = "correct horse battery staple"
PAYLOAD = "what nobody else may read"


@pytest.fixture(scope="module")
def nodes(valkey_binary, tmp_path_factory):
    """Return a server with two nodes and their callers, of which one pair signs its messages."""
    directory = tmp_path_factory.mktemp("nodes")
    with contextlib.ExitStack() as stack:
        server = Server(valkey_binary)
        stack.callback(server.close)
        server.start()

        def peer(name, secret=""):
            made = Peer(server.url, directory, name, host=name, secret=secret)
            return stack.enter_context(contextlib.closing(made))

        yield SimpleNamespace(
            plain=(peer("plain"), peer("caller")),
            signed=(peer("signed", SECRET), peer("signing", SECRET)),
            server=server,
            runs=Runs(directory),
        )


class Pair:
    """A node, a caller, and a look behind their backs."""

    def __init__(self, nodes, node, caller, admin) -> None:
        self.node, self.caller, self.admin, self.runs = node, caller, admin, nodes.runs
        self.name = node.node or node.serve("gpu", concurrency=2)
        self.keys = NodeKeys(self.name)
        self._logged = len(node.log())

    def call(self, function, *args, **options):
        return self.caller.call(self.name, function, *args, **options)

    def add(self, fields) -> None:
        self.admin.xadd(self.keys.calls, fields)

    def log(self) -> str:
        """Return what the node logged in this test."""
        return self.node.log()[self._logged :]

    def dead(self) -> list:
        return [fields for _, fields in self.admin.xrange(self.keys.dead)]

    def captured(self, begin) -> dict:
        """Return the entry of a message, caught before the node takes it."""
        self.node.stop()
        done = begin()
        wait_until(lambda: self.admin.xlen(self.keys.calls), "the message is in the stream")
        [(_, fields)] = self.admin.xrange(self.keys.calls)
        self.node.go_on()
        assert done.result(30).error is None
        return fields

    def refuses(self, fields) -> None:
        """Check that a message is taken out, and not run; the node goes on."""
        ran = self.runs.all()
        self.add(fields)
        wait_until(lambda: not self.admin.xlen(self.keys.calls), "it is out of the stream")
        assert self.call("size", PAYLOAD, "four") == 4
        assert self.runs.all() == [*ran, PAYLOAD]
        assert PAYLOAD not in self.log()
        assert SECRET not in self.log()


@pytest.fixture
def plain(nodes):
    with nodes.server.admin() as admin:
        pair = Pair(nodes, *nodes.plain, admin)
        admin.delete(pair.keys.dead)
        yield pair


@pytest.fixture
def signed(nodes):
    with nodes.server.admin() as admin:
        yield Pair(nodes, *nodes.signed, admin)


def envelope(pair, kind=Kind.CAST, **fields) -> Envelope:
    """Return the head of a message for `note`, as somebody who knows the format would write it."""
    return Envelope(
        **{
            "kind": kind,
            "id": os.urandom(16),
            "node": pair.name,
            "target": "work",
            "method": "note",
            "options": {"cast": os.urandom(4).hex()} if kind is Kind.CAST else {},
            "timeout": 60.0,
            "size": len(body()),
            **fields,
        }
    )


def body() -> bytes:
    return Body([PAYLOAD]).joined()


def entry(head, values=None, *, deadline=2 * 10**12, signature=b"", kind=Kind.CAST) -> dict:
    name = b"c" if kind is Kind.CAST else b"d"
    return {name: deadline, b"h": head, b"b": body() if values is None else values, b"s": signature}


def large(pair, kind, size, pieces) -> dict:
    """Return a message of which the values should lie beside the stream."""
    head = envelope(pair, kind, size=size, pieces=pieces, place=os.urandom(16)).head()
    return entry(head, b"", kind=kind)


POISON = {
    "garbage": lambda pair, kind: {b"x": os.urandom(50), b"h": os.urandom(500)},
    "no head": lambda pair, kind: entry(b"", kind=kind),
    "no deadline": lambda pair, kind: entry(envelope(pair, kind).head(), deadline="soon"),
    "an endless deadline": lambda pair, kind: entry(
        envelope(pair, kind).head(), deadline="9" * 400, kind=kind
    ),
    "a damaged head": lambda pair, kind: entry(envelope(pair, kind).head()[:-7], kind=kind),
    "a future version": lambda pair, kind: entry(
        b"hb\x63\x63" + codec.encode([PAYLOAD]), kind=kind
    ),
    "other fields": lambda pair, kind: entry(
        envelope(pair, kind).head()[:4] + codec.encode([PAYLOAD]), kind=kind
    ),
    "a short body": lambda pair, kind: entry(envelope(pair, kind).head(), body()[:-3], kind=kind),
    "a damaged body": lambda pair, kind: entry(
        envelope(pair, kind).head(), b"\xc1" * len(body()), kind=kind
    ),
    "no pieces": lambda pair, kind: large(pair, kind, 300_000, 1),
    "too many pieces": lambda pair, kind: large(pair, kind, 10, 2**40),
    "too large": lambda pair, kind: large(pair, kind, 2**50, 2**30),
}
STRANGE = {
    "an unknown function": {"method": "tolt"},
    "damaged options": {"options": {"cast": 7, "names": 8}},
    "too few arguments": {"options": {"cast": "x", "names": ["a", "b", "c"]}},
}


class TestPoison:
    @pytest.mark.parametrize("kind", [Kind.CALL, Kind.CAST], ids=["call", "cast"])
    @pytest.mark.parametrize("poison", POISON)
    def test_a_poisoned_message_stops_nobody(self, plain, poison, kind):
        """A cast is kept as a dead letter, and so is a call of which it is not known whose it is."""
        plain.refuses(POISON[poison](plain, kind))
        if kind is Kind.CAST:
            [dead] = plain.dead()
            assert dead[b"reason"]
            assert PAYLOAD.encode() not in dead[b"reason"]
            assert "dead letter" in plain.log()

    @pytest.mark.parametrize("strange", STRANGE)
    def test_a_strange_call_stops_nobody(self, plain, strange):
        """Nobody reads the answer."""
        fields = {"inbox": os.urandom(16), **STRANGE[strange]}
        plain.refuses(entry(envelope(plain, Kind.CALL, **fields).head(), kind=Kind.CALL))

    @pytest.mark.slow
    def test_strange_casts_become_dead_letters(self, plain):
        """When they have been tried some times: the node may learn the function yet."""
        for fields in STRANGE.values():
            plain.add(entry(envelope(plain, **fields).head()))
        wait_until(lambda: len(plain.dead()) == len(STRANGE), "they are dead letters", 60)
        assert not plain.admin.xlen(plain.keys.calls)
        assert not [dead for dead in plain.dead() if PAYLOAD.encode() in dead[b"reason"]]
        assert PAYLOAD not in plain.log()
        assert plain.call("size", "after", "four") == 4

    def test_a_call_whose_values_are_gone_fails(self, plain):
        plain.node.stop()
        called = plain.caller.begin("send", plain.name, "large", 3_000_000, LONG_MS)
        wait_until(lambda: plain.admin.xlen(plain.keys.calls), "the call is in the stream")
        parts = list(plain.admin.scan_iter("hb:*:part:*"))
        plain.admin.delete(*parts)
        plain.node.go_on()
        assert called.result(30).error == "CodecError"
        assert len(parts) == 3
        assert plain.runs.count("large") == 0

    def test_an_answer_that_makes_no_sense_is_dropped(self, plain):
        """Somebody writes into the inbox of a caller."""
        assert plain.call("note", "first") == "first"
        wrong = ({b"x": b"y"}, {b"m": os.urandom(99), b"s": b""}, {b"m": b"", b"s": b""})
        for inbox in plain.admin.scan_iter("hb:*:inbox:*"):
            for fields in wrong:
                plain.admin.xadd(inbox, fields)
        assert plain.call("note", "second") == "second"


class TestSignatures:
    def test_a_forged_message_is_refused(self, signed):
        head = envelope(signed, sent=now(signed), digest=digest()).head()
        wrong = sign_head(b"another secret of enough bytes", head)
        signed.refuses(entry(head, signature=wrong))
        assert "its signature is wrong" in signed.log()

    @pytest.mark.parametrize("kind", [Kind.CALL, Kind.STREAM, Kind.CAST], ids=str)
    def test_an_unsigned_message_is_refused(self, signed, kind):
        signed.refuses(entry(envelope(signed, kind).head(), kind=kind))
        assert "it is not signed" in signed.log()

    def test_another_body_under_a_signed_head_is_refused(self, signed):
        other = body().replace(b"nobody", b"anyone")
        head = envelope(signed, sent=now(signed), digest=digest()).head()
        signed.refuses(entry(head, other, signature=sign_head(SECRET.encode(), head)))
        assert "not those that were signed" in signed.log()

    def test_a_message_for_another_node_is_refused(self, signed):
        head = envelope(signed, node="other@signed", sent=now(signed), digest=digest()).head()
        signed.refuses(entry(head, signature=sign_head(SECRET.encode(), head)))
        assert "for another node" in signed.log()

    def test_a_replayed_call_is_refused(self, signed):
        """The same bytes, taken from the stream and put there again, also with a later deadline."""
        fields = signed.captured(
            lambda: signed.caller.begin_call(signed.name, "note", "called once")
        )
        for deadline in (fields[b"d"], b"%d" % (now(signed) + 10**9)):
            signed.refuses({**fields, b"d": deadline})
        assert signed.runs.count("called once") == 1
        assert "was here before" in signed.log()

    def test_a_replayed_cast_is_refused(self, signed):
        fields = signed.captured(
            lambda: signed.caller.begin("cast", signed.name, "note", ["cast once"])
        )
        signed.runs.wait_for("cast once")
        signed.refuses(fields)
        assert signed.runs.count("cast once") == 1

    def test_a_caller_that_does_not_sign_is_told(self, nodes, signed):
        _, caller = nodes.plain
        refused = caller.outcome("call", signed.name, "note", ["unsigned"], LONG_MS)
        assert refused.error == "ConfigError"
        assert "HORNBEAM_SECRET" in refused.message
        assert signed.runs.count("unsigned") == 0


@pytest.fixture
def gate(tmp_path):
    """A file that lets `hold_until` go on; also when the test fails."""
    path = tmp_path / "gate"
    yield path
    path.touch()


def now(pair) -> int:
    seconds, microseconds = pair.admin.time()
    return seconds * 1000 + microseconds // 1000


def digest() -> bytes:
    return digest_of([body()])


class TestLimits:
    def test_what_is_not_exposed_is_not_imported(self, plain):
        """Neither a module that could be, nor one that is there already."""
        for function in ("antigravity.fly", "os.getpid", "work.write", "subprocess.run"):
            refused = plain.caller.outcome("call", plain.name, function, [], LONG_MS)
            assert refused.error == "NotExposed"
        assert plain.call("has_imported", "antigravity") is False
        assert plain.call("has_imported", "os") is True

    def test_a_name_is_taken_on_every_host(self, nodes, plain, peer):
        """As long as its owner lives, whatever process asks for it on whatever machine."""
        elsewhere = peer(nodes.server.url, "elsewhere", host="elsewhere")
        refused = elsewhere.outcome("serve", plain.name, {})
        assert refused.error == "ConfigError"
        assert f"{plain.name} is taken by process {plain.node.pid} on plain" in refused.message
        assert plain.call("note", "still here") == "still here"
        assert elsewhere.serve("gpu") == "gpu@elsewhere"

    def test_a_cancelled_call_that_waits_never_runs(self, plain, gate):
        held = [
            plain.caller.begin_call(plain.name, "hold_until", f"held {number}", str(gate))
            for number in range(2)
        ]
        for number in range(2):
            plain.runs.wait_for(f"held {number}")
        waits = [plain.caller.begin_call(plain.name, "note", f"waits {n}") for n in range(20)]
        kept = plain.caller.begin_call(plain.name, "note", "kept")
        wait_until(lambda: plain.admin.xlen(plain.keys.calls) == 21, "they are in the stream")
        for future in waits:
            assert plain.caller.do("cancel", future.number) is True
        assert {future.result(30).error for future in waits} == {"CancelledError"}
        wait_until(lambda: plain.admin.xlen(plain.keys.calls) == 1, "they are out of the stream")
        gate.touch()
        assert [future.result(30).value for future in held] == ["held 0", "held 1"]
        assert kept.result(30).value == "kept"
        assert not [label for label in plain.runs.all() if label.startswith("waits")]

    def test_a_cancelled_call_that_runs_is_cancelled(self, plain):
        running = plain.caller.begin_call(plain.name, "ahold", "running", 60)
        plain.runs.wait_for("running")
        assert plain.caller.do("cancel", running.number) is True
        assert running.result(30).error == "CancelledError"
        plain.runs.wait_for("running cancelled")
