"""The embedded store: its directory, damage, limits, long keys, forks, and being closed."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from child_processes import PATIENCE, Child, start_program

import hornbeam_state
from hornbeam_state import (
    HornbeamError,
    Store,
    StoreConfig,
    StoreFull,
    StoreUnavailable,
    open_store,
)
from hornbeam_state.backends.embedded import data_file, lmdb_files
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.testing import ManualClock

MIB = 1024 * 1024
PAGE = 4096
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def in_child(work, *args) -> SimpleNamespace:
    return Child(work, *args).outcome()


def refused(outcome: SimpleNamespace) -> str:
    """Check that a store was refused as one of ours is, and return the message."""
    assert outcome.error == "StoreUnavailable", (
        f"{outcome.error}: {outcome.message or outcome.value}"
    )
    return outcome.message


@pytest.fixture
def place(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def opened():
    """Return what opens a store in a directory; it is closed at the end."""
    made = []

    def make(place: Path, **options) -> Store:
        # Others may use it too, and any of them be kept waiting by a busy machine.
        made.append(open_store(f"lmdb://{place}", **{"timeout": 20, **options}))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(opened, place):
    return opened(place)


@pytest.fixture
def shared_directory():
    """A directory that every user of the machine can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="hb-test-"))
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture
def mount():
    """Return what mounts a small file system; where that is not allowed the test is skipped."""
    mounted = []

    def make(path: Path, options: str) -> Path:
        path.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a file system here: {error}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go during the test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The directory.


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_directory_is_closed_to_others(place, opened, umask):
    """Whatever the umask; its files are too, and git ignores it."""
    before = os.umask(umask)
    try:
        opened(place / "in" / "the" / "depth").set("k", 1)
    finally:
        os.umask(before)
    path = place / "in" / "the" / "depth"
    assert mode(path) == 0o700
    assert (path / ".gitignore").read_text() == "*\n"
    assert {
        entry.name: mode(entry) & 0o077 for entry in path.iterdir() if mode(entry) & 0o077
    } == {}
    assert {".gitignore", "format.json", "state.lmdb", "cache.lmdb"} <= {
        entry.name for entry in path.iterdir()
    }
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith((".new", ".probe"))]


def test_an_empty_directory_that_is_there_is_taken(place, opened):
    """And closed to others; a .gitignore that lies in it stays."""
    place.mkdir(mode=0o755)
    (place / ".gitignore").write_text("mine\n")
    opened(place).set("k", 1)
    assert mode(place) == 0o700
    assert (place / ".gitignore").read_text() == "mine\n"


def test_a_link_to_a_directory_is_that_directory(place, opened, tmp_path):
    """Two ways to one store are one store, also in one process."""
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    one, other = opened(place), opened(tmp_path / "link")
    one.set("k", 1)
    assert other.incr("k") == 2
    one.close()
    assert other.incr("k") == 3
    assert one.incr("k") == 4


def unwritable_places(tmp_path: Path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    return {
        "under-a-file": tmp_path / "file" / "store",
        "a-file": tmp_path / "file",
        "proc": Path("/proc/hornbeam/store"),
        "sys": Path("/sys/hornbeam"),
        "a-loop": tmp_path / "loop",
        "a-dangling-link": tmp_path / "dangling",
        "long-name": tmp_path / ("x" * 300),
    }


@pytest.mark.parametrize(
    "kind",
    ["under-a-file", "a-file", "proc", "sys", "a-loop", "a-dangling-link", "long-name"],
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path, opened, kind):
    """When it was asked for by name: with its name and what to set instead, at every use."""
    path = unwritable_places(tmp_path)[kind]
    store = opened(path)
    for use in (store.check, lambda: store.get("k"), lambda: store.lock("k").__enter__()):
        with pytest.raises(StoreUnavailable) as caught:
            use()
        assert str(path) in str(caught.value)
        assert "HORNBEAM_STORE=lmdb:///" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)


def test_a_read_only_file_system_is_refused(tmp_path, opened, mount):
    """Also to root, who passes every check of permissions, and with a store already in it."""
    path = mount(tmp_path / "mounted", "size=1m")
    store = opened(path / "store", cache_size=MIB)
    store.set("k", 1)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    for name in ("store", "new"):
        message = refused(in_child(lambda name=name: open_store(f"lmdb://{path}/{name}").get("k")))
        assert "Read-only file system" in message
        assert "HORNBEAM_STORE=lmdb:///" in message


def from_environment(path: Path) -> Store:
    """Return the store of a process whose working directory that is, and names none."""
    os.chdir(path)
    return Store(StoreConfig.from_env({}))


@pytest.mark.parametrize("kind", ["read-only", "proc", "a-file-of-that-name"])
def test_the_default_place_falls_back_when_it_cannot_be_written(tmp_path, temporary, mount, kind):
    """To one temporary directory for all processes of the user, with a warning at each."""
    path = Path("/proc")
    if kind == "read-only":
        path = mount(tmp_path / "mounted", "size=1m,ro")
    elif kind == "a-file-of-that-name":
        path = tmp_path / "app"
        path.mkdir()
        (path / ".hornbeam").write_text("mine")

    def count() -> list[str | int]:
        store = from_environment(path)
        with pytest.warns(RuntimeWarning) as caught:
            number = store.incr("n")
        return [number, str(store.backend.directory), str(caught[0].message)]

    numbers, directories, messages = zip(*[Child(count).value() for _ in range(3)], strict=True)
    assert numbers == (1, 2, 3)
    assert len(set(directories)) == 1
    used = Path(directories[0])
    assert used.parent == temporary
    assert mode(used) == 0o700
    for message in messages:
        assert str(path / ".hornbeam") in message
        assert str(used) in message
        assert "HORNBEAM_STORE=lmdb:///" in message


def test_a_lack_of_descriptors_is_no_reason_to_fall_back(tmp_path, temporary):
    """A worker that counted in a store of its own from then on would be silently wrong."""
    app = tmp_path / "app"
    app.mkdir()
    Child(lambda: from_environment(app).set("k", "everyone's")).value()

    def use_without_descriptors() -> list[str]:
        store = from_environment(app)
        problems = []
        for left in range(12):
            with exhausted_descriptors(left):
                try:
                    store.check()
                except HornbeamError:
                    pass
                except Exception as error:
                    problems.append(f"with {left} descriptors: {error!r}")
            if store.get("k") != "everyone's":
                problems.append(f"with {left} descriptors: another store")
            store.close()
        return problems

    warnings.simplefilter("error")
    assert Child(use_without_descriptors).value() == []
    assert list(temporary.iterdir()) == []


@contextlib.contextmanager
def exhausted_descriptors(left: int):
    """Leave this process only so many descriptors; not to be used in pytest's own."""
    highest = max(
        int(path.name) for path in Path("/proc/self/fd").iterdir()
    )  # inherited ones included
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 60, hard))
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    for descriptor in held[len(held) - left :]:
        os.close(descriptor)
    try:
        yield
    finally:
        for descriptor in held[: len(held) - left]:
            os.close(descriptor)


def test_a_full_disk_is_no_reason_to_fall_back(tmp_path, temporary, mount):
    """Nor for anything but an error of ours; when there is room again, the store works."""
    path = mount(tmp_path / "mounted", "size=1m")
    (path / "app").mkdir()
    filler = path / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))

    def use() -> list[str]:
        store = from_environment(path / "app")
        with pytest.raises(HornbeamError) as caught:
            store.set("k", 1)
        filler.unlink()
        store.set("k", 2)
        return [str(caught.value), str(store.backend.directory), store.get("k")]

    message, used, value = Child(use).value()
    assert used == str(path / "app" / ".hornbeam")
    assert value == 2
    assert "No space left" in message or "full" in message
    assert list(temporary.iterdir()) == []


# Other users.


def as_nobody(work, *args) -> SimpleNamespace:
    def work_as_nobody():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return work(*args)

    return in_child(work_as_nobody)


@as_root
def test_another_users_directory_is_refused(shared_directory, opened):
    """With both user ids and what to do; it is closed anyway, and stays as it was."""
    path = shared_directory / "roots"
    opened(path).set("k", "secret")
    message = refused(as_nobody(lambda: open_store(f"lmdb://{path}").get("k")))
    assert str(path) in message
    assert "user id 0" in message
    assert str(NOBODY) in message
    assert "HORNBEAM_STORE=lmdb:///" in message
    assert opened(path).get("k") == "secret"


@as_root
@pytest.mark.parametrize("permissions", [0o700, 0o777])
def test_root_does_not_use_anothers_directory(shared_directory, permissions):
    """Root could, and would leave files in it that its owner cannot open."""
    shared_directory.chmod(0o777)
    path = shared_directory / "nobodys"
    assert as_nobody(lambda: open_store(f"lmdb://{path}").set("k", 1)).error is None
    path.chmod(permissions)
    before = sorted(entry.name for entry in path.iterdir())
    message = refused(in_child(lambda: open_store(f"lmdb://{path}").get("k")))
    assert f"user id {NOBODY}" in message
    assert sorted(entry.name for entry in path.iterdir()) == before


@as_root
def test_permissions_are_real_for_ordinary_users(shared_directory, monkeypatch):
    """A directory that may not be written: refused by name, fallen back from by default."""
    (shared_directory / "temporary").mkdir(mode=0o777)
    (shared_directory / "temporary").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared_directory / "temporary"))
    message = refused(as_nobody(lambda: open_store(f"lmdb://{shared_directory}/s").get("k")))
    assert "Permission denied" in message

    def by_default() -> list[str | int]:
        store = from_environment(shared_directory)
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            number = store.incr("n")
        return [number, str(store.backend.directory.parent)]

    for expected in (1, 2):
        outcome = as_nobody(by_default)
        assert outcome.error is None, outcome.message
        assert outcome.value == [expected, str(shared_directory / "temporary")]


@as_root
def test_a_default_directory_of_another_user_is_refused(shared_directory):
    """Falling back would silently split one app in two."""
    Child(lambda: from_environment(shared_directory).set("k", 1)).value()
    message = refused(as_nobody(lambda: from_environment(shared_directory).get("k")))
    assert "belongs to user id 0" in message


# Foreign and damaged directories.


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(entry.relative_to(path)): entry.read_bytes()
        for entry in path.rglob("*")
        if entry.is_file()
    }


def test_a_directory_of_other_things_is_refused(place, opened):
    """Nothing in it is touched; the message names something that lies there."""
    place.mkdir(mode=0o755)
    (place / "thesis.txt").write_text("years of work")
    (place / "folder").mkdir()
    with pytest.raises(StoreUnavailable, match="not a hornbeam store") as caught:
        opened(place).set("k", 1)
    assert "folder" in str(caught.value) or "thesis.txt" in str(caught.value)
    assert contents(place) == {"thesis.txt": b"years of work"}
    assert mode(place) == 0o755


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b'{"format": "hornbeam-store", "version": 2}', id="later-version"),
        pytest.param(b'{"format": "hornbeam-store", "version": 0}', id="earlier-version"),
        pytest.param(b'{"format": "hornbeam-store", "version": null}', id="no-version"),
        pytest.param(b'{"format": "hornbeam-store"}', id="version-missing"),
        pytest.param(b'{"format": "other", "version": 1}', id="other-format"),
        pytest.param(b"", id="empty"),
        pytest.param(b'{"format": "hornb', id="cut-off"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"1", id="number"),
        pytest.param(b"\xff\xfe\x00", id="not-utf-8"),
        pytest.param(bytes(64), id="zeros"),
        pytest.param(b"[" * 100_000, id="deeply-nested"),
        pytest.param(b"1" * 5_000, id="long-number"),
    ],
)  # fmt: skip
def test_another_format_is_refused_and_left_alone(place, opened, text):
    """The message says what was found; with the right file back, all is there."""
    store = opened(place)
    store.set("k", "kept")
    store.close()
    marker = place / "format.json"
    right = marker.read_bytes()
    marker.write_bytes(text)
    before = contents(place)
    message = refused(in_child(lambda: open_store(f"lmdb://{place}").get("k")))
    assert str(marker) in message
    assert "version" in message
    assert "HORNBEAM_STORE=lmdb:///" in message
    assert contents(place) == before
    marker.write_bytes(right)
    assert store.get("k") == "kept"


@pytest.mark.parametrize(
    "name", ["state.lmdb", "cache.lmdb", "state.lmdb-lock", "users", "locks", "format.json"]
)
def test_a_directory_in_the_place_of_a_file_is_an_error_of_ours(place, opened, name):
    """However the directory was mistreated, callers catch `StoreUnavailable`."""
    store = opened(place)
    with store.lock("name"):
        store.set("k", 1)
    store.close()
    (place / name).rename(place.parent / "aside")
    (place / name).mkdir()
    with pytest.raises(StoreUnavailable, match=name.removesuffix("-lock")), store.lock("name"):
        store.get("k")


def test_a_damaged_lock_file_is_made_anew(place, opened):
    """It holds nothing that outlives the processes that use it."""
    store = opened(place)
    store.set("k", 1)
    store.close()
    (place / "state.lmdb-lock").write_bytes(os.urandom(8192))
    assert in_child(lambda: open_store(f"lmdb://{place}").incr("k")).value == 2


# Damaged files. Each is opened in a process of its own: LMDB may crash on what it maps.


def sound_store(place: Path, opened) -> dict[str, bytes]:
    """Make a store of some pages in both files, close it, and return the files' bytes."""
    store = opened(place)
    store.set_multi({f"key/{number:03}": b"%d" % number * 50 for number in range(300)})
    store.set_multi({f"large/{number}": b"x" * 10_000 for number in range(3)})
    for number in range(100):
        store.delete(f"key/{number:03}")
    store.space("cache").set_multi({f"key/{number:03}": number for number in range(300)})
    store.set("n", 5)
    store.close()
    return {name: (place / name).read_bytes() for name in ("state.lmdb", "cache.lmdb")}


def read_all(place: Path) -> list[str]:
    """Use the store in every way; return a digest of what it holds."""
    store = open_store(f"lmdb://{place}")
    found = []
    for space in (store, store.space("sys"), store.space("cache")):
        values = space.get_multi(space.keys())
        found += [f"{key}={value!r:.200}" for key, value in sorted(values.items())]
    return found


def with_bytes(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


DAMAGE = [
    pytest.param(lambda data: data[: len(data) // 2], id="half"),
    pytest.param(lambda data: data[:-PAGE], id="without-its-last-page"),
    pytest.param(lambda data: data[:-1], id="without-its-last-byte"),
    pytest.param(lambda data: data[: 2 * PAGE], id="two-pages"),
    pytest.param(lambda data: data[:PAGE], id="one-page"),
    pytest.param(lambda data: data[:100], id="100-bytes"),
    pytest.param(lambda data: data[:1], id="one-byte"),
    pytest.param(lambda data: bytes(len(data)), id="zeros"),
    pytest.param(lambda data: bytes(100), id="100-zeros"),
    pytest.param(lambda data: os.urandom(len(data)), id="random"),
    pytest.param(lambda data: b"SQLite format 3\0" + bytes(8176), id="another-database"),
    pytest.param(lambda data: with_bytes(data, 0, bytes(PAGE)), id="zeros-for-the-first-page"),
    pytest.param(lambda data: with_bytes(data, PAGE, bytes(PAGE)), id="zeros-for-the-second-page"),
    pytest.param(lambda data: with_bytes(data, 0, os.urandom(2 * PAGE)), id="random-header"),
    pytest.param(lambda data: with_bytes(data, 16, b"\0\0\0\0"), id="no-magic"),
    pytest.param(lambda data: with_bytes(data, PAGE + 16, b"\0\0\0\0"), id="no-second-magic"),
    pytest.param(lambda data: with_bytes(data, 20, b"\x63"), id="lmdb-version"),
    pytest.param(lambda data: with_bytes(data, 40, b"\0\0\0\0"), id="page-size-zero"),
    pytest.param(lambda data: with_bytes(data, 40, b"\x01\x10"), id="page-size-odd"),
    pytest.param(lambda data: with_bytes(data, 40, b"\xff\xff\xff\x7f"), id="page-size-huge"),
    pytest.param(lambda data: with_bytes(with_bytes(data, 128, b"\xff" * 8), PAGE + 128, b"\xff" * 8), id="both-roots"),
    pytest.param(lambda data: bytes(2 * PAGE) + data[2 * PAGE :], id="zeros-for-the-header"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_left_alone(place, opened, damage):
    """With its name and what to do; restored, everything is there again."""
    name = "state.lmdb"
    files = sound_store(place, opened)
    expected = Child(read_all, place).value()
    (place / name).write_bytes(damage(files[name]))
    before = (place / name).read_bytes()
    for _ in range(2):
        message = refused(in_child(read_all, place))
        assert str(place / name) in message
        assert "damaged" in message
        assert f"mv {place / name}" in message
        assert (place / name).read_bytes() == before
    (place / name).write_bytes(files[name])
    assert Child(read_all, place).value() == expected


def test_what_the_message_about_damage_says_helps(place, opened):
    """Moving the file away starts afresh, and the other file keeps what it has."""
    files = sound_store(place, opened)
    (place / "state.lmdb").write_bytes(files["state.lmdb"][:5000])
    message = refused(in_child(read_all, place))
    command = message[message.index("mv ") :]
    subprocess.run(command.split(), check=True)

    def use() -> list[int]:
        store = open_store(f"lmdb://{place}")
        return [store.incr("n"), len(store.space("cache").keys())]

    assert Child(use).value() == [1, 300]
    assert (place / "state.lmdb.damaged").stat().st_size == 5000


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda page: bytes(len(page)), id="zeros"),
        pytest.param(lambda page: os.urandom(len(page)), id="random"),
        pytest.param(lambda page: bytes([page[0] ^ 1]) + page[1:], id="another-page-number"),
        pytest.param(lambda page: page[:10] + b"\x01\0" + page[12:], id="another-kind"),
        pytest.param(lambda page: page[:12] + b"\xff\xff\xff\xff" + page[16:], id="bounds"),
        pytest.param(lambda page: page[:16] + b"\xff" * 64 + page[80:], id="offsets"),
    ],
)  # fmt: skip
def test_a_damaged_page_is_found_by_the_first_to_open(place, opened, damage):
    """Whichever page it is: refused, or without effect since the page was free; never a crash."""
    files = sound_store(place, opened)
    expected = Child(read_all, place).value()
    found = 0
    for name, data in [("state.lmdb", files["state.lmdb"])]:
        pages = len(data) // PAGE
        in_a_large_value = {
            page for page in range(pages) if data[page * PAGE + 16 :][:64] == b"x" * 64
        }
        for page in set(range(2, pages)) - in_a_large_value:
            start = page * PAGE
            damaged = with_bytes(data, start, damage(data[start : start + PAGE]))
            if data[start : start + PAGE].count(b"x") > PAGE // 2:
                continue  # the inside of a large value, which has no structure
            (place / name).write_bytes(damaged)
            outcome = in_child(read_all, place)
            if outcome.error is None:
                assert outcome.value == expected, f"{name}, page {page}: other values"
            else:
                found += 1
                assert str(place / name) in refused(outcome)
                assert (place / name).read_bytes() == damaged
        (place / name).write_bytes(data)
    assert found >= 5
    assert Child(read_all, place).value() == expected


def test_damage_met_while_opening_a_large_store_is_an_error_of_ours(place, opened, monkeypatch):
    """Large files are not verified first; what LMDB then says of them is translated."""
    files = sound_store(place, opened)
    monkeypatch.setattr(data_file, "_THOROUGH_UP_TO", 0)
    raw = set()
    for name, data in files.items():
        for page in range(2, len(data) // PAGE):
            (place / name).write_bytes(with_bytes(data, page * PAGE, bytes(PAGE)))
            outcome = in_child(lambda: open_store(f"lmdb://{place}").check())
            if outcome.error is not None and not outcome.ours:
                raw.add(f"{outcome.error}: {outcome.message}")
        (place / name).write_bytes(data)
    assert raw == set()


def test_a_sound_file_is_never_called_damaged(place, opened):
    """LMDB may end its file before pages it counted in but never had to write."""
    store = opened(place)
    for sizes in (
        {"k35": 488},
        {"k38": 431},
        {"k41": 2203, "k46": 1042, "k45": 1429, "k32": 252, "k1": 1723},
        {"k14": 165},
        {"k13": 1980},
        {"k42": 1540},
        {"k48": 2240},
    ):
        store.set_multi({key: b"x" * size for key, size in sizes.items()})
    assert store.clear("k4") == 5
    store.close()
    assert store.keys() == ["k1", "k13", "k14", "k32", "k35", "k38"]


def test_a_sound_cache_that_evicted_is_never_called_damaged(place, opened):
    """After every eviction of whatever size the store can be opened again."""
    cache = opened(place, cache_size=MIB).space("cache")
    for number in range(40):
        cache.set(f"k{number:03}", bytes(30_000 * (1 + number % 4)))
        data_file.check_data_file(place / "cache.lmdb", alone=True)
    cache.close()
    cache.check()


# Long keys.

SHARED = "x" * 448
LONG_KEYS = [
    SHARED + tail
    for tail in (
        *("y" * length for length in (1, 31, 32, 33, 34, 63, 64, 65, 551, 3647, 3648)),
        *("z" * 100 + end for end in ("a", "b", "ä")),
        "\0" * 33,
    )
]


def test_long_keys_that_begin_alike_are_apart(store):
    """From 449 to 4096 bytes with the same first 448, in every operation."""
    for number, key in enumerate(LONG_KEYS):
        assert store.add(key, number) is True
    store.set(SHARED, "short")
    store.set("x" * 480, "plain")
    names = [SHARED, "x" * 480, *LONG_KEYS]
    assert store.keys() == sorted(names)
    assert store.get_multi(LONG_KEYS) == {key: number for number, key in enumerate(LONG_KEYS)}
    assert store.get(SHARED + "absent" * 100) is None
    assert [store.incr(key) for key in LONG_KEYS] == list(range(1, len(LONG_KEYS) + 1))
    assert store.cas(LONG_KEYS[3], 4, "new")
    assert store.delete(LONG_KEYS[4])
    assert store.delete(LONG_KEYS[4]) is False
    assert store.update(LONG_KEYS[5], lambda old: [old]) == [6]
    names.remove(LONG_KEYS[4])
    assert store.keys() == sorted(names)
    for length in (447, 448, 449, 480, 481, 500, 547, 548, 549, 600, 4096):
        for key in (*LONG_KEYS, "x" * 4096):
            prefix = key[:length]
            assert store.keys(prefix) == sorted(name for name in names if name.startswith(prefix))


def test_long_keys_are_cleared_by_their_full_prefix(store):
    """Also by one that is longer than what LMDB keeps of a key."""
    store.set_multi(dict.fromkeys([*LONG_KEYS, SHARED, "x" * 447, "y"], 1))
    assert store.clear(SHARED + "z" * 100) == 3
    assert store.clear(SHARED + "y" * 64) == 5
    assert store.clear(LONG_KEYS[-1]) == 1
    assert store.clear(SHARED + "nothing" * 50) == 0
    assert store.clear(SHARED) == len(LONG_KEYS) - 9 + 1
    assert store.keys() == ["x" * 447, "y"]


def test_long_keys_expire(place):
    """Each at its own time; listing and clearing see only those that have time left."""
    clock = ManualClock()
    config = StoreConfig.from_url(f"lmdb://{place}")
    store = Store(config, backend=EmbeddedBackend(config, clock=clock))
    for number, key in enumerate(LONG_KEYS):
        store.set(key, number, ttl=number + 1)
    clock.advance(5.5)
    assert store.keys(SHARED) == sorted(LONG_KEYS[5:])
    assert store.get(LONG_KEYS[4]) is None
    assert store.ttl(LONG_KEYS[6]) == pytest.approx(1.5, abs=0.01)
    assert store.incr(LONG_KEYS[0], ttl=3) == 1
    assert store.incr(LONG_KEYS[7]) == 8
    clock.advance(1)
    assert store.ttl(LONG_KEYS[0]) == pytest.approx(2, abs=0.01)
    assert store.clear(SHARED) == len(LONG_KEYS) - 6 + 1
    store.close()


# Limits.


def fill(store: Store, size: int) -> int:
    """Store values until there is no room; return how many there were."""
    for number in range(100_000):
        try:
            store.set(f"fill/{number:06}", number.to_bytes(4, "big") * (size // 4))
        except StoreFull:
            return number
    raise AssertionError("the store never was full")


@pytest.mark.parametrize("size", [40, 400, 1500, 20_000])
def test_a_full_store_keeps_what_it_has_and_goes_on(place, opened, size):
    """Reading works, deleting makes room, again and again; nothing is lost."""
    store = opened(place, state_size=MIB)
    store.set("before", [1, 2])
    counts = []
    for _ in range(4):
        count = fill(store, size)
        counts.append(count)
        assert store.get("before") == [1, 2]
        assert len(store.keys("fill/")) == count
        for number in (0, count // 2, count - 1):
            assert store.get(f"fill/{number:06}") == number.to_bytes(4, "big") * (size // 4)
        assert Child(lambda: len(open_store(f"lmdb://{place}").keys("fill/"))).value() == count
        assert store.delete("fill/000000")
        store.set("fill/000000", b"\0" * (size // 2))
        for number in range(count // 2):
            assert store.delete(f"fill/{number:06}")
        for number in range(count // 4):
            store.set(f"again/{number}", bytes(size))
        for key in [*store.keys("again/"), *store.keys("fill/")]:
            assert store.delete(key)
    assert min(counts) > 0.8 * max(counts), "room was lost"
    assert store.keys() == ["before"]


@pytest.mark.parametrize("size", [40, 400, 1500, 20_000])
def test_a_full_store_can_be_cleared(place, opened, size):
    """It is the first thing that one tries."""
    store = opened(place, state_size=MIB)
    count = fill(store, size)
    assert store.clear("fill/") == count
    assert fill(store, size) > 0.8 * count


def test_a_full_store_says_which_limit_to_raise(place, opened):
    """Of the two files that a directory has, the right one."""
    store = opened(place, state_size=MIB, cache_size=MIB)
    with pytest.raises(StoreFull, match="state_size") as caught:
        store.set("k", bytes(2 * MIB))
    assert str(place) in str(caught.value)
    with pytest.raises(StoreFull, match="cache_size"):
        store.space("cache").set("k", bytes(2 * MIB))
    store.set("k", 1)
    store.space("cache").set("k", 1)
    assert (store.get("k"), store.space("cache").get("k")) == (1, 1)


def test_a_value_that_does_not_fit_changes_nothing(place, opened):
    """Neither the old value nor the others of the same `set_multi`."""
    store = opened(place, state_size=MIB)
    store.set("k", "old", ttl=100)
    with pytest.raises(StoreFull):
        store.set_multi({"a": 1, "k": bytes(2 * MIB), "z": 1})
    with pytest.raises(StoreFull):
        store.cas("k", "old", bytes(2 * MIB))
    assert store.keys() == ["k"]
    assert store.get("k") == "old"
    assert store.ttl("k") is not None


def test_a_full_disk_keeps_what_is_there_and_goes_on(tmp_path, opened, mount):
    """`StoreFull`, not a crash; reading works, and deleting makes room."""
    path = mount(tmp_path / "mounted", "size=2m")
    store = opened(path / "store")
    count = fill(store, 1500)
    assert count > 100
    with pytest.raises(StoreFull, match="disk"):
        store.set_multi({f"more/{number}": bytes(1500) for number in range(500)})
    assert len(store.keys()) == count
    assert store.get("fill/000007") == (7).to_bytes(4, "big") * 375
    for number in range(count // 2):
        assert store.delete(f"fill/{number:06}")
    store.set("k", bytes(1500))
    assert store.incr("n") == 1
    store.close()
    assert store.get("k") == bytes(1500)


# The cache.


def usage(cache: Store):
    return cache.backend.keyspace("cache").usage()


@pytest.mark.parametrize("size", [100, 1500, 5000])
def test_a_cache_stays_within_its_bound(place, opened, size):
    """While ten times its size is written; what is still there is right, the rest is counted."""
    bound = MIB
    store = opened(place, cache_size=bound)
    store.set("state", "is not evicted")
    cache = store.space("cache")
    written = 10 * bound // size
    for number in range(written):
        cache.set(f"{number * 7919 % written:08}/key", number.to_bytes(4, "big") * (size // 4))
        if number % 100 == 0:
            assert cache.get(f"{number * 7919 % written:08}/key") is not None
            assert (place / "cache.lmdb").stat().st_size <= bound
    assert (place / "cache.lmdb").stat().st_size <= bound
    present = cache.get_multi(cache.keys())
    for number in range(written):
        value = present.get(f"{number * 7919 % written:08}/key")
        assert value is None or value == number.to_bytes(4, "big") * (size // 4)
    # Eviction runs ahead, and a small entry takes twice its value's size: keys, times, pages.
    assert len(present) * size > bound * 0.15, "most of the cache lies idle"
    assert usage(cache).entries == len(present)
    assert usage(cache).entries + usage(cache).evictions == written
    assert store.get("state") == "is not evicted"


@pytest.mark.parametrize("size", [20_000, 60_000, 100_000, 150_000])
def test_a_cache_of_large_values_keeps_the_latest(place, opened, size):
    """Eviction makes as much room as is needed: it neither empties the cache nor takes the new."""
    cache = opened(place, cache_size=MIB).space("cache")
    for number in range(60):
        cache.set(f"key/{number % 17}", number.to_bytes(4, "big") * (size // 4))
        assert cache.get(f"key/{number % 17}") is not None, "it evicted what it had just stored"
        if number > 10:
            assert usage(cache).entries >= 2, "it evicted everything"


WAYS_TO_FILL = {
    "set_multi": lambda cache, turn: cache.set_multi({f"{turn}/{i}": os.urandom(1000) for i in range(100)}),
    "add": lambda cache, turn: [cache.add(f"{turn}/{i}", os.urandom(1000)) for i in range(100)],
    "cas": lambda cache, turn: [cache.cas(f"{turn}/{i}", hornbeam_state.MISSING, os.urandom(1000)) for i in range(100)],
    "update": lambda cache, turn: [cache.update(f"{turn}/{i}", lambda _: os.urandom(1000)) for i in range(100)],
    "incr": lambda cache, turn: [cache.incr(f"{turn}/{i}/{'x' * 400}") for i in range(100)],
    "growing": lambda cache, turn: cache.set(f"{turn}", os.urandom(1000 * (turn + 1))),
    "shrinking": lambda cache, turn: cache.set(f"{turn}", os.urandom(1000 * (200 - turn))),
    "small-then-large": lambda cache, turn: cache.set(f"{turn}", os.urandom(300_000)) if turn > 150 else [cache.set(f"{turn}/{i}", os.urandom(200)) for i in range(40)],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS_TO_FILL)
def test_a_cache_is_never_full(place, opened, way):
    """Whatever method fills it, and whatever the sizes, it evicts rather than refuses."""
    cache = opened(place, cache_size=2 * MIB).space("cache")
    for turn in range(200):
        WAYS_TO_FILL[way](cache, turn)
    assert usage(cache).evictions > 0
    assert cache.keys()


def test_evictions_of_processes_add_up(place, opened):
    """The count belongs to the store, not to a process, and outlives all of them."""
    cache = opened(place, cache_size=MIB).space("cache")

    def write(name: int) -> None:
        mine = open_store(f"lmdb://{place}", cache_size=MIB, timeout=20).space("cache")
        for number in range(1500):
            mine.set(f"{number:05}/{name}", bytes(1000))

    children = [Child(write, name) for name in range(3)]
    for child in children:
        child.value()
    assert usage(cache).entries + usage(cache).evictions == 4500
    cache.close()
    assert usage(cache).entries + usage(cache).evictions == 4500


# Several stores in one process; closing.


def test_two_stores_on_one_directory_are_one_store(place, opened):
    """In one process too, where LMDB must not open a file twice."""
    one, other = opened(place), opened(place)
    one.set("k", 1)
    assert other.incr("k") == 2
    one.close()
    one.close()
    assert other.incr("k") == 3
    assert one.incr("k") == 4
    other.close()
    assert one.incr("k") == 5
    one.close()
    with pytest.raises(KeyError):
        lmdb_files._open_files[place]
    assert one.space("sys").keys() == []
    assert one.incr("k") == 6


def test_a_closed_store_opens_again(store):
    """Any number of times, with everything in it, in every space."""
    spaces = [store, store.space("sys"), store.space("cache")]
    for turn in range(1, 20):
        assert [space.incr("n") for space in spaces] == [turn] * 3
        spaces[turn % 3].close()


async def test_an_awaited_close_opens_again(store):
    """As the direct one."""
    await store.aset("k", 1)
    await store.aclose()
    assert await store.aget("k") == 1
    await store.aclose()
    await store.aclose()


def test_close_before_first_use_does_nothing(store, place):
    """It does not even create the directory."""
    store.close()
    assert not place.exists()


def test_a_store_that_could_not_open_opens_when_it_can(place, opened):
    """Nothing of the failure sticks."""
    place.write_text("in the way")
    store = opened(place)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            store.set("k", 1)
    place.unlink()
    assert store.incr("k") == 1


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("scheme", ["lmdb", "memory"])
def test_closed_stores_leave_no_descriptors(place, opened, scheme):
    """Nor do failed attempts to open one."""

    def use() -> int:
        gc.collect()
        before = descriptors()
        for number in range(20):
            store = open_store(f"lmdb://{place}/{number}" if scheme == "lmdb" else "memory://")
            store.set("k", 1)
            store.close()
            with contextlib.suppress(StoreUnavailable):
                open_store(f"lmdb://{in_the_way}").check()
            with contextlib.suppress(StoreUnavailable):
                open_store(f"lmdb://{damaged}").check()
        del store
        gc.collect()  # or the directories of those in memory stay: a child ends without clean-up
        return descriptors() - before

    in_the_way = place.parent / "file"
    in_the_way.write_text("in the way")
    damaged = place.parent / "damaged"
    opened(damaged).check()
    opened(damaged).close()
    (damaged / "cache.lmdb").write_bytes(b"damaged")
    assert Child(use).value() == 0


@pytest.mark.parametrize("scheme", ["lmdb", "memory"])
def test_forgotten_stores_leave_no_descriptors(place, scheme):
    """A store that nobody closed, as in a test, gives back its files when it is collected."""

    def use() -> int:
        gc.collect()
        before = descriptors()
        for number in range(20):
            store = open_store(f"lmdb://{place}/{number}" if scheme == "lmdb" else "memory://")
            store.set("k", 1)
        del store
        gc.collect()
        deadline = time.monotonic() + 10
        while descriptors() - before > 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        return descriptors() - before

    assert Child(use).value() <= 10


def test_started_programs_do_not_inherit_the_files(store, place):
    """Also where they inherit what else is open."""
    store.set("k", 1)
    program = start_program()
    inherited = [os.readlink(entry) for entry in Path(f"/proc/{program.pid}/fd").iterdir()]  # noqa: PTH115
    program.communicate(timeout=PATIENCE)
    assert [file for file in inherited if file.startswith(str(place))] == []


def run(script: str, *args: object, timeout: float = PATIENCE) -> str:
    """Run a program of its own and return its output; a crash or a hang is a failure."""
    place = str(Path(hornbeam_state.__file__).parent.parent)
    command = [sys.executable, "-X", "faulthandler", "-c", script, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": place}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it hangs; until then it said: {error.stdout} {error.stderr}")
    assert done.returncode == 0, (
        f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    )
    return done.stdout


CLOSING = """
import faulthandler, os, random, sys, threading, time
from hornbeam_state import StoreUnavailable, open_store

store = open_store(f"lmdb://{sys.argv[1]}")
store.set("value", b"x" * 1500)
end = time.monotonic() + 1.5
problems, counted = [], [0, 0, 0]

def use(name):
    while time.monotonic() < end:
        try:
            if name == 0:
                counted[0] += 1 if store.incr("n") else 0
            elif store.get("value") != b"x" * 1500:
                problems.append("another value")
        except StoreUnavailable:
            pass  # it was closed under its feet
        except BaseException as error:
            problems.append(repr(error))

def close():
    while time.monotonic() < end:
        store.close()
        time.sleep(random.random() * 0.002)

threads = [threading.Thread(target=use, args=(name % 2,), daemon=True) for name in range(4)]
threads.append(threading.Thread(target=close, daemon=True))
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(max(end + 20 - time.monotonic(), 0.01))
if any(thread.is_alive() for thread in threads):
    faulthandler.dump_traceback()
    os._exit(3)
if not counted[0] <= store.get("n", 0):
    problems.append("increments are lost")
if store.get("value") != b"x" * 1500 or not store.incr("n"):
    problems.append("unusable")
sys.exit("\\n".join(sorted(set(problems))) or 0)
"""


def test_a_store_may_be_closed_while_threads_use_it(place):
    """They fail or open it again; nothing hangs, crashes, or is lost."""
    run(CLOSING, place)


def test_a_close_between_opening_and_reading_harms_nobody(place):
    """A thread that meets the closed files opens them again, now or with its next call."""
    store = open_store(f"lmdb://{place}")
    store.set("k", 1)
    store.close()
    backend = store.backend
    open_as_ever = backend.opened

    def open_and_lose(*asked):
        files = open_as_ever()
        backend.opened = open_as_ever
        backend.close()  # another thread's, just now
        return files

    backend.opened = open_and_lose
    with contextlib.suppress(StoreUnavailable):
        store.get("k")
    assert store.get("k") == 1
    assert store.incr("k") == 2
    store.close()


def test_threads_that_are_first_together_open_once(place, opened):
    """However many there are, and over two stores."""
    stores = [opened(place), opened(place)]
    start = threading.Barrier(16)
    numbers, errors = [], []

    def first(store: Store) -> None:
        start.wait()
        try:
            numbers.append(store.incr("n"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=first, args=(stores[i % 2],)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == []
    assert sorted(numbers) == list(range(1, 17))


# memory://


def test_a_memory_store_leaves_nothing_behind():
    """Its directory goes with the process, also when a forked child ended before."""
    script = """
import os, sys
from hornbeam_state import open_store
store = open_store("memory://")
store.set("k", 1)
store.close()
assert store.get("k") == 1
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert store.backend.directory.is_dir()
print(store.backend.directory)
"""
    path = Path(run(script).strip())
    assert path.name.startswith("hornbeam-")
    assert not path.exists()


# Forks.


def test_a_child_uses_the_store_its_parent_opened(store):
    """Both go on, in every space; neither disturbs the other's next steps."""
    store.set("k", "parent's")
    spaces = [store, store.space("sys"), store.space("cache")]
    for space in spaces:
        space.set("n", 0)

    def work() -> list[str | int]:
        seen = store.get("k")
        for space in spaces:
            for _ in range(100):
                space.incr("n")
        store.set("k", "child's")
        store.close()
        return [seen, store.get("n")]

    child = Child(work)
    for space in spaces:
        for _ in range(100):
            space.incr("n")
    seen, count = child.value()
    assert seen == "parent's"
    assert count >= 100
    assert [space.get("n") for space in spaces] == [200] * 3
    assert store.get("k") == "child's"


def test_a_fork_within_a_read_of_many_keys(store):
    """A fork between two operations of a loop is a fork at any time."""
    store.set_multi({f"k{number}": number for number in range(50)})
    for number in range(50):
        assert Child(store.get, f"k{number}").value() == number
        assert store.get(f"k{number}") == number


def test_a_fork_within_update(store):
    """Nothing is held while the user's function runs, so it may fork."""
    store.set("n", 1)

    def fork_and_double(old: int) -> int:
        assert Child(store.incr, "children").value() == 1
        return old * 2

    assert store.update("n", fork_and_double) == 2
    assert store.get("children") == 1


FORKING = """
import os, sys, threading, time
from hornbeam_state import open_store

store = open_store(f"lmdb://{sys.argv[1]}", timeout=20)
value = b"x" * 1500
store.set("value", value)
done = threading.Event()
problems = []
reads = [0, 0, 0, 0]

def read(name):
    while not done.is_set():
        try:
            if store.get("value") != value:
                problems.append("another value")
            if name == 0:
                store.incr("parent")
            reads[name] += 1
        except BaseException as error:
            problems.append(repr(error))
            return

threads = [threading.Thread(target=read, args=(name,)) for name in range(4)]
for thread in threads:
    thread.start()
while not all(reads):
    time.sleep(0.001)
statuses = []
for number in range(50):
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(10):
                store.incr("children")
                assert store.get("value") == value
                store.set(f"child/{number}", value)
        except BaseException as error:
            if number == 0:
                print(f"child: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        if number % 2:
            os._exit(0)
        sys.exit(0)
    statuses.append(os.waitpid(pid, 0)[1])
done.set()
for thread in threads:
    thread.join(10)
if any(statuses):
    problems.append(f"{sum(map(bool, statuses))} of {len(statuses)} children failed: {sorted(set(statuses))}")
if store.get("children") != 500:
    problems.append(f"children counted {store.get('children')}")
if store.get("parent") != reads[0]:
    problems.append(f"parent counted {store.get('parent')} of {reads[0]}")
if len(store.keys("child/")) != 50:
    problems.append(f"children wrote {len(store.keys('child/'))}")
print("\\n".join(problems))
sys.exit(bool(problems))
"""


def test_fifty_children_are_forked_while_threads_read(place):
    """Children read, write and exit in both ways; parent and children never notice each other."""
    run(FORKING, place, timeout=3 * PATIENCE)


def test_a_child_forked_by_a_thread_uses_the_store(store):
    """Whichever thread forks, and whatever the main thread holds."""
    store.set("k", 1)
    found = []

    def fork() -> None:
        found.append(in_child(lambda: [store.get("k"), store.incr("n")]))

    with store.lock("name"):
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join(PATIENCE)
    assert found[0].value == [1, 1]


def test_interrupted_writes_leave_the_store_usable(place):
    """An exception from a signal handler, at any moment of a write, holds up nobody."""
    script = """
import os, random, signal, sys, time
from hornbeam_state import open_store

class Interrupted(BaseException):
    pass

def interrupt(*_):
    raise Interrupted

store = open_store(f"lmdb://{sys.argv[1]}")
other = store.space("sys")
attempted, acknowledged = store.incr("n"), 1
signal.signal(signal.SIGALRM, interrupt)
interruptions = 0
end = time.monotonic() + 1.5
while time.monotonic() < end or interruptions <= 20:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-5, 3e-4))
        while True:
            attempted += 1
            store.incr("n")
            acknowledged += 1
            store.set_multi({"a": 1, "b": 2})
            store.keys()
            other.delete("x")
    except Interrupted:
        interruptions += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
assert acknowledged <= store.get("n") <= attempted, (acknowledged, store.get("n"), attempted)
pid = os.fork()
if pid == 0:
    try:
        fresh = open_store(f"lmdb://{sys.argv[1]}", timeout=20)
        start = time.monotonic()
        fresh.incr("other process")
        assert time.monotonic() - start < 10, "another process had to wait"
    except BaseException as error:
        print(f"in another process: {error!r}", flush=True)
        os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
store.incr("n")
assert time.monotonic() < end + 10, f"{interruptions} interruptions took long: something waited"
"""
    run(script, place)
