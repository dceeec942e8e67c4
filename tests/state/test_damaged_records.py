"""Records that LMDB hands out as they were never written: an error of ours, and nothing worse."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hornbeam_state import CounterOverflow, StoreConfig, StoreError, StoreUnavailable, WrongType
from hornbeam_state.backends.base import SPACES
from hornbeam_state.backends.embedded import records
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.testing import ManualClock

PLAIN, LONG = b"plain", b"long/" * 200
SOON = 100.0

DAMAGED = [
    pytest.param(b"", id="nothing"),
    pytest.param(b"\0", id="flags alone"),
    pytest.param(bytes(8), id="half a header"),
    pytest.param(b"\x04" + bytes(8) + b"value", id="unknown flags"),
    pytest.param(b"\xff" + bytes(8) + b"value", id="all flags"),
    pytest.param(b"\x01" + bytes(8), id="no long key"),
    pytest.param(b"\x01" + bytes(8) + b"\x05", id="half a length"),
    pytest.param(b"\x01" + bytes(8) + b"\xff\xff" + b"key", id="cut off long key"),
    pytest.param(b"\x02" + bytes(8), id="no reference"),
    pytest.param(b"\x02" + bytes(8) + b"short", id="half a reference"),
    pytest.param(b"\x02" + bytes(8) + bytes(41), id="long reference"),
    pytest.param(b"\x02" + bytes(8) + bytes(40), id="reference to nothing"),
    pytest.param(b"\x03" + bytes(8) + b"\x01\x00k", id="long key and no reference"),
]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def backend(tmp_path, clock):
    config = StoreConfig.from_url(f"lmdb://{tmp_path}/store", snapshot_every=0)
    backend = EmbeddedBackend(config, clock=clock)
    yield backend
    backend.close()


def write_raw(backend, space, database, key, record) -> None:
    """Put a record where it is kept, past everything that makes records."""
    file = backend.opened().file(space)
    handle = file.databases[space] if database is None else getattr(file, database)
    with file.environment.begin(handle, write=True) as txn:
        assert txn.put(key, record)


def damage(backend, space, record) -> None:
    """Write the record in place of those of both keys."""
    keyspace = backend.keyspace(space)
    for key in (PLAIN, LONG):
        keyspace.put(key, b"v", SOON)
        write_raw(backend, space, None, keyspace._stored(key), record)


def use(keyspace) -> list[BaseException]:
    """Do everything there is to do with both keys, and return the errors that come of it."""
    errors = []
    for key in (PLAIN, LONG):
        for work in (
            lambda key=key: keyspace.get(key),
            lambda key=key: keyspace.get_many([key]),
            lambda key=key: keyspace.ttl(key),
            lambda key=key: keyspace.keys(key),
            lambda key=key: keyspace.usage(key),
            lambda key=key: keyspace.cas(key, b"v", b"w"),
            lambda key=key: keyspace.incr(key, 1),
            lambda key=key: keyspace.put(key, b"w", SOON),
            lambda key=key: keyspace.delete(key),
            lambda key=key: keyspace.clear(key),
        ):
            try:
                work()
            except Exception as error:
                errors.append(error)
    return errors


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("record", DAMAGED)
def test_a_damaged_record_is_an_error_of_ours(backend, space, record):
    """In every operation; other keys are as they were."""
    damage(backend, space, record)
    keyspace = backend.keyspace(space)
    with pytest.raises(StoreUnavailable, match="damaged"):
        keyspace.get(PLAIN)
    errors = use(keyspace)
    assert [
        error for error in errors if not isinstance(error, StoreError | WrongType | KeyError)
    ] == []
    keyspace.put(b"other", b"v", SOON)
    assert keyspace.get(b"other") == b"v"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"", bytes(9), b"\x01", b"\x02", b"\x03"]))
def test_any_bytes_are_a_record_or_an_error_of_ours(record, start):
    """Whatever is asked of them."""
    data = start + record
    for form in (data, memoryview(data)):
        for ask in (
            records.expiry_of,
            records.blob_of,
            lambda record: records.payload(bytes(record)),
            lambda record: records.full_key(b"stored", record),
        ):
            with suppress(StoreUnavailable):
                ask(form)


@pytest.mark.parametrize("space", SPACES)
def test_records_with_a_bit_flipped_are_harmless(backend, space):
    """Each bit of the header, the key and the reference, and some others."""
    keyspace = backend.keyspace(space)
    numbers = random.Random(5)
    for value in (b"17", b"v" * 50, b"large" * 20_000):
        for key in (PLAIN, LONG):
            keyspace.put(key, value, SOON)
            stored = keyspace._stored(key)
            record = keyspace._read_record(stored)
            for bit in {*range(96), *numbers.sample(range(8 * len(record)), 40)}:
                if bit < 8 * len(record):
                    damaged = bytearray(record)
                    damaged[bit // 8] ^= 1 << bit % 8
                    check_record(backend, space, stored, bytes(damaged))
            write_raw(backend, space, None, stored, record)
            assert keyspace.get(key) == value


def check_record(backend, space, stored, record) -> None:
    keyspace = backend.keyspace(space)
    write_raw(backend, space, None, stored, record)
    for key in (PLAIN, LONG):
        for work in (
            lambda key=key: keyspace.get(key),
            lambda key=key: keyspace.ttl(key),
            lambda key=key: keyspace.keys(key),
            lambda key=key: keyspace.cas(key, b"other", b"w"),
            lambda key=key: keyspace.usage(key),
        ):
            with suppress(StoreError, KeyError, WrongType, CounterOverflow):
                work()


# What is kept beside the records.


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(b"\0", id="cut off"),
        pytest.param(bytes(8), id="no space"),
        pytest.param(bytes(8) + b"?key", id="unknown space"),
        pytest.param(bytes(8) + b"a", id="no key"),
    ],
)
def test_a_damaged_index_of_expiries_keeps_nothing_from_being_swept(backend, clock, space, entry):
    """An entry that makes no sense goes when its time has come."""
    keyspace = backend.keyspace(space)
    keyspace.put(b"k", b"v", SOON)
    write_raw(backend, space, "index", entry, b"")
    clock.advance(2 * SOON)
    assert backend.sweep() == 2
    assert keyspace.usage().entries == 0
    assert backend.sweep() == 0


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("record", DAMAGED)
def test_a_damaged_record_keeps_nothing_from_being_swept(backend, clock, space, record):
    """It goes with the others."""
    damage(backend, space, record)
    keyspace = backend.keyspace(space)
    keyspace.put(b"later", b"v", SOON + 1)
    clock.advance(2 * SOON)
    assert backend.sweep() == 3
    assert keyspace.usage().entries == 0


def test_damaged_records_keep_nothing_from_being_evicted(tmp_path):
    """A full cache with nothing but damaged records in it makes room."""
    config = StoreConfig.from_url(f"lmdb://{tmp_path}/small", cache_size=2**20, snapshot_every=0)
    small = EmbeddedBackend(config)
    keyspace = small.keyspace("cache")
    for number in range(10):
        key = b"%d" % number
        keyspace.put(key, b"v")
        write_raw(small, "cache", None, keyspace._stored(key), b"\xff" * 40_000)
    for number in range(100, 140):
        keyspace.put(b"%d" % number, b"v" * 40_000)
    assert keyspace.get(b"139") == b"v" * 40_000
    small.close()


def test_a_damaged_count_of_evictions_is_an_error_of_ours(backend):
    """It is told by `usage`, and counted up when the cache evicts."""
    keyspace = backend.keyspace("cache")
    keyspace.put(b"k", b"v")
    write_raw(backend, "cache", "meta", b"evictions", b"many")
    with pytest.raises(StoreUnavailable, match="damaged"):
        keyspace.usage()
    assert keyspace.get(b"k") == b"v"


@pytest.mark.parametrize("space", SPACES)
def test_a_damaged_count_of_references_is_an_error_of_ours(backend, space):
    """Those of a large value's file."""
    keyspace = backend.keyspace(space)
    large = b"large" * 20_000
    keyspace.put(b"k", large)
    references = backend.opened().file(space).blobs._references
    file = backend.opened().file(space)
    with file.environment.begin(references, write=True) as txn:
        names = list(txn.cursor().iternext(values=False))
        for name in names:
            txn.put(name, b"several")
    for work in (
        lambda: keyspace.put(b"k", b"v"),
        lambda: keyspace.put(b"other", large),
        lambda: keyspace.delete(b"k"),
        keyspace.usage,
    ):
        with pytest.raises(StoreUnavailable, match="damaged"):
            work()
    assert keyspace.get(b"k") == large
