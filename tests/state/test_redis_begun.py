"""Which calls a node knows to have begun."""

from __future__ import annotations

from hornbeam_state.transports.redis import begun
from hornbeam_state.transports.redis.begun import Begun


def test_a_call_begins_once():
    known = Begun()
    assert known.note(b"a", 5.0, now=100.0)
    assert known.note(b"b", 5.0, now=100.0)
    assert not known.note(b"a", 5.0, now=104.0)


def test_a_call_is_forgotten_when_it_is_late_anyway():
    known = Begun()
    assert known.note(b"a", 5.0, now=100.0)
    assert known.note(b"b", 5.0, now=106.0)
    assert list(known._until) == [b"b"]


def test_as_many_are_known_as_may_be(monkeypatch):
    monkeypatch.setattr(begun, "MOST_KNOWN", 10)
    known = Begun()
    for number in range(25):
        assert known.note(b"%d" % number, 5.0, now=100.0)
    assert len(known._until) == 10
    assert not known.note(b"24", 5.0, now=100.0)
    assert known.note(b"0", 5.0, now=100.0)
