"""What is in an entry of a stream: read as it was written, and refused when it was not."""

from __future__ import annotations

import contextlib
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam_state.errors import CodecError, ConfigError
from hornbeam_state.transports.redis.bodies import Body, read_body
from hornbeam_state.transports.redis.envelope import (
    LONGEST_MS,
    SKEW_MS,
    Answer,
    Envelope,
    Kind,
    Refused,
    cancellation,
    check_answer,
    check_head,
    deadline_of,
    digest_of,
    read_answer,
    read_cancellation,
    read_head,
    secret_from,
    sign_answer,
    sign_head,
)

SECRET = b"correct horse battery staple"
ID = bytes(range(16))


def envelope(**changes) -> Envelope:
    values = {
        "kind": Kind.CALL,
        "id": ID,
        "node": "gpu@ml-1",
        "inbox": b"i" * 16,
        "target": "ml",
        "method": "predict",
        "options": {"a": 1},
        "timeout": 2.5,
        "sent": 1_700_000_000_000,
        "size": 7,
        "digest": b"d" * 32,
    }
    return Envelope(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="a call"),
        pytest.param({"kind": Kind.STREAM}, id="a stream"),
        pytest.param({"kind": Kind.CAST, "inbox": b"", "timeout": inf}, id="a cast"),
        pytest.param({"pieces": 3, "place": b"p" * 16, "size": 3 * 2**20}, id="large values"),
    ],
)
def test_a_head_is_read_as_it_was_written(changes):
    written = envelope(**changes)
    assert read_head(written.head()) == written
    assert check_head(SECRET, written.head(), sign_head(SECRET, written.head()), "gpu@ml-1")


@pytest.mark.parametrize(
    ("head", "signature", "node", "reason"),
    [
        pytest.param(envelope().head(), b"", "gpu@ml-1", "not signed", id="unsigned"),
        pytest.param(envelope().head(), b"x" * 32, "gpu@ml-1", "wrong", id="forged"),
        pytest.param(envelope().head(), None, "other", "another node", id="for another"),
        pytest.param(envelope(sent=0).head(), None, "gpu@ml-1", "without its time", id="no time"),
        pytest.param(
            envelope(digest=b"").head(), None, "gpu@ml-1", "without its time", id="no digest"
        ),
    ],
)
def test_a_head_that_is_not_signed_right_is_refused(head, signature, node, reason):
    signature = sign_head(SECRET, head) if signature is None else signature
    with pytest.raises(Refused, match=reason):
        check_head(SECRET, head, signature, node)


@pytest.mark.parametrize("seconds", [0.0, -1.0, -inf, nan])
def test_a_timeout_that_is_none_is_refused(seconds):
    with pytest.raises(Refused, match="no sense"):
        read_head(envelope(timeout=seconds).head())


@pytest.mark.parametrize(
    ("changes", "written", "until"),
    [
        pytest.param({"sent": 0}, 99, 99, id="unsigned: as written"),
        pytest.param({"sent": 1000}, 2000, 2000, id="earlier than signed"),
        pytest.param({"sent": 1000}, 10**14, 1000 + 2500 + SKEW_MS, id="later than signed"),
        pytest.param(
            {"sent": 1000, "timeout": inf}, 10**14, 1000 + LONGEST_MS + SKEW_MS, id="endless"
        ),
    ],
)
def test_what_was_signed_bounds_the_deadline(changes, written, until):
    assert deadline_of(envelope(**changes), written) == until


def test_an_answer_is_read_as_it_was_written_and_belongs_to_its_inbox():
    answer = Answer(Kind.CHUNK, ID, 4, 10, 20, b"part")
    data = answer.to_bytes()
    assert read_answer(data) == answer
    signature = sign_answer(SECRET, b"inbox", data)
    check_answer(SECRET, b"inbox", data, signature)
    for inbox, content in ((b"other", data), (b"inbox", data[:-1] + b"T")):
        with pytest.raises(Refused, match="wrong"):
            check_answer(SECRET, inbox, content, signature)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_cancellation_is_read_as_it_was_written(secret):
    ids = [ID, ID[::-1]]
    assert read_cancellation(secret, "n", cancellation(secret, "n", ids)) == ids
    if secret:
        for message in (cancellation(None, "n", ids), cancellation(secret, "m", ids)):
            with pytest.raises(Refused):
                read_cancellation(secret, "n", message)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    for prefix in (b"", envelope().head()[:4]):
        for read in (read_head, read_answer):
            with contextlib.suppress(Refused):
                read(prefix + data)
    for read in (read_body, lambda data: read_cancellation(None, "n", data)):
        with contextlib.suppress(Refused, CodecError):
            read(data)


@pytest.mark.parametrize("most", [1, 7, 64, 8192, 10**6])
def test_pieces_of_a_body_make_the_body(most):
    body = Body(["text", np.arange(1000), b"x" * 5000, None, []])
    pieces = list(body.pieces(most))
    assert b"".join(pieces) == body.joined()
    assert len(body.joined()) == body.size
    assert all(len(piece) == most for piece in pieces[:-1])
    assert digest_of(pieces) == digest_of([body.joined()])
    assert read_body(body.joined())[0] == "text"


def test_large_arrays_are_cut_without_a_copy():
    array = np.zeros(2**20)
    pieces = list(Body([array]).pieces(2**20))
    assert sum(isinstance(piece, memoryview) for piece in pieces) >= len(pieces) - 2


def test_the_secret_is_that_of_the_environment_unless_given(monkeypatch):
    monkeypatch.setenv("HORNBEAM_SECRET", "e" * 20)
    assert secret_from(None) == b"e" * 20
    assert secret_from("g" * 20) == b"g" * 20
    assert secret_from("") is None
    monkeypatch.delenv("HORNBEAM_SECRET")
    assert secret_from(None) is None
    with pytest.raises(ConfigError, match="16 at least"):
        secret_from("short")
