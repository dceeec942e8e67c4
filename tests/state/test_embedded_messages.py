"""Messages on the embedded store: subscribers that die, stop or lag, and what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
from child_processes import start_program, stop

from hornbeam_state import DeadlineExceeded, StoreFull, StoreUnavailable, open_store
from hornbeam_state.backends.base import INBOX_BYTES, Topics
from hornbeam_state.backends.embedded import lmdb_files, mailboxes, wakeups

PATIENCE = 60.0
"""Seconds after which a hanging child is killed, and its test fails."""

KIB = 1024


class Child:
    """A forked process that says when it is ready, and hands back what came of its work.

    Args:
        work: Takes a function to call when it is ready, then the arguments.
    """

    def __init__(self, work, *args, **options) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: "may lead to deadlocks"
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
                value = work(lambda: os.write(writer, b"!"), *args, **options)
                os.write(writer, json.dumps(value).encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writer)
        self._reader = reader

    def when_ready(self) -> Child:
        assert os.read(self._reader, 1) == b"!"
        return self

    def value(self):
        with os.fdopen(self._reader, "rb") as file:
            data = file.read()
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0
        return json.loads(data)

    def send(self, what: signal.Signals) -> None:
        os.kill(self.pid, what)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reader)


@pytest.fixture
def url(tmp_path):
    # Its users may be many, and any of them be kept waiting by a busy machine.
    return f"lmdb://{tmp_path}/store?timeout=20"


@pytest.fixture
def store(url):
    store = open_store(url)
    store.check()
    yield store
    store.close()


def messages_of(store):
    return store.backend._messages


def left(store) -> dict[str, int]:
    """Count what the subscriptions of a store take: rows, sockets and files of large messages."""
    messages = messages_of(store)
    file = messages._bind()[1]
    counted = {
        name: messages.view(lambda txn, handle=handle: txn.stat(handle)["entries"])
        for name, handle in file.databases.items()
    }
    directory = store.backend.directory
    return {
        **counted,
        "sockets": len(list((directory / "inboxes").iterdir())),
        "files": len(list((directory / "messages.blobs").iterdir())),
    }


NOTHING = {"messages": 0, "members": 0, "subscribers": 0, "sockets": 0, "files": 0}


def collect(ready, url, count, *topics, **options):
    """Subscribe, and return the data of so many messages and how many were dropped."""
    with open_store(url, timeout=30).subscribe(*topics, **options) as subscription:
        ready()
        got = [subscription.get(PATIENCE).data for _ in range(count)]
        return got, subscription.dropped


def subscribe_and_wait(ready, url, *topics, **options):
    subscription = open_store(url).subscribe(*topics, **options)
    ready()
    signal.pause()
    subscription.close()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# What a store without messages pays.


def test_a_store_without_messages_has_no_files_of_them(store):
    """Nothing is opened before somebody publishes or subscribes."""
    store.set("k", 1)
    assert store.lock("l").__enter__()
    assert not list(store.backend.directory.glob("messages*"))
    assert not (store.backend.directory / "inboxes").exists()
    assert messages_of(store).wake_all() is False
    assert messages_of(store).remove_leftovers() is False
    assert not list(store.backend.directory.glob("messages*"))
    store.publish("t", 1)
    assert (store.backend.directory / "messages.lmdb").exists()


# Many processes.


def test_processes_that_keep_up_lose_nothing(store, url):
    """Eight of them get every message in order, while two publish."""
    count = 1000
    readers = [
        Child(collect, url, 2 * count + 1, "t*" if number % 2 else "t", maxsize=10_000)
        for number in range(8)
    ]
    for reader in readers:
        reader.when_ready()

    def publish(ready) -> int:
        mine = open_store(url, timeout=30)
        return sum(mine.publish("t", ["other", number]) for number in range(count))

    publisher = Child(publish)
    for number in range(count):
        assert store.publish("t", ["own", number]) == 8
    assert publisher.value() == 8 * count
    assert store.publish("t", ["end", 0]) == 8
    for reader in readers:
        got, dropped = reader.value()
        assert dropped == 0
        for name in ("own", "other"):
            assert [n for who, n in got if who == name] == list(range(count))
    wait_until(lambda: store.publish("t", 0) == 0)
    assert left(store) == NOTHING


@pytest.mark.parametrize("turn", range(3))
def test_processes_may_be_the_first_together(url, turn):
    """Sixteen that subscribe at once in a store without files of messages, or without any."""
    gate, open_gate = os.pipe()

    def come_first(ready) -> int:
        os.read(gate, 1)
        with open_store(url, timeout=30).subscribe("t") as subscription:
            ready()
            return subscription.get(PATIENCE).data

    children = [Child(come_first) for _ in range(16)]
    os.write(open_gate, b"." * 16)
    for child in children:
        child.when_ready()
    os.close(gate)
    os.close(open_gate)
    store = open_store(url, timeout=30)
    assert store.publish("t", 17) == 16
    assert [child.value() for child in children] == [17] * 16
    store.close()


@pytest.mark.slow
def test_forks_amid_publishing_break_nothing(store):
    """Each child has messages of its own, whatever threads of the parent were doing."""
    stop = threading.Event()
    published = [0, 0]

    def publish(index):
        while not stop.is_set():
            published[index] += store.publish("parent", index)

    def live(ready, number) -> int:
        with store.subscribe(f"child/{number}") as subscription:
            own = store.publish(f"child/{number}", number)
            return [own, store.publish("parent", "child"), subscription.get(PATIENCE).data]

    with store.subscribe("parent", maxsize=10**5) as subscription:
        threads = [threading.Thread(target=publish, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for number in range(30):
            assert Child(live, number).value() == [1, 1, number]
        stop.set()
        for thread in threads:
            thread.join()
        # On a slow machine the children take so long that more is published than may wait.
        for _ in range(sum(published) + 30 - subscription.dropped):
            subscription.get(PATIENCE)
        with pytest.raises(DeadlineExceeded):
            subscription.get(0)
    # A child that found the others writing left its rows to whoever sees that its socket is closed.
    messages_of(store).wake_all()
    while messages_of(store).remove_leftovers():
        pass
    assert left(store) == NOTHING


@pytest.mark.parametrize("maxsize", [1, 7, 300])
def test_what_a_fast_publisher_drops_is_counted_exactly(store, url, maxsize):
    """Every message is taken or counted, whatever the race, and what is taken is in order."""

    def read(ready):
        got = []
        with open_store(url, timeout=30).subscribe("t", maxsize=maxsize) as subscription:
            ready()
            while not got or got[-1] >= 0:
                got.append(subscription.get(PATIENCE).data)
                if len(got) % 50 == 0:
                    time.sleep(0.005)
            return got, subscription.dropped

    reader = Child(read).when_ready()
    for number in range(3000):
        assert store.publish("t", number) == 1
    store.publish("t", -1)
    got, dropped = reader.value()
    assert got[-1] == -1
    assert got[:-1] == sorted(set(got[:-1]))
    assert len(got) + dropped == 3001


def test_large_messages_that_are_dropped_are_counted_exactly(store, url):
    """Also where the file of one goes between its row and itself."""

    def read(ready):
        with open_store(url, timeout=30).subscribe("t", maxsize=2) as subscription:
            ready()
            numbers = []
            while not numbers or numbers[-1] >= 0:
                number, text = subscription.get(PATIENCE).data
                assert text == str(number) * 70_000
                numbers.append(number)
            return len(numbers), subscription.dropped

    reader = Child(read).when_ready()
    for number in [*range(500), -1]:
        assert store.publish("t", (number, str(number) * 70_000)) == 1
    assert sum(reader.value()) == 501
    wait_until(lambda: store.publish("t", 0) == 0)
    assert left(store) == NOTHING


# Those who die or stop.


def test_a_killed_subscriber_counts_no_more(store, url):
    """The next message finds it dead and takes away what waited for it."""
    child = Child(subscribe_and_wait, url, "t", "large").when_ready()
    assert store.publish("t", 1) == 1
    assert store.publish("large", b"x" * 100_000) == 1
    child.kill()
    with store.subscribe("t") as subscription:
        assert store.publish("t", 2) == 1
        assert subscription.get(PATIENCE) == ("t", 2)
        assert store.publish("large", 3) == 0
    assert left(store) == NOTHING


def test_upkeep_removes_killed_subscribers(store, url):
    """Those to whom nobody publishes any more, with all they leave."""
    children = [
        Child(subscribe_and_wait, url, "t", maxsize=size).when_ready() for size in (3, 3, 5000)
    ]
    with open_store(url).subscribe("t", maxsize=3) as alive:
        for number in range(2500):
            store.publish("t", number)
        store.publish("t", b"x" * 100_000)
        for child in children:
            child.kill()
        age_sockets(store)
        messages_of(store).wake_all()
        while messages_of(store).remove_leftovers():
            pass
        expected = {"messages": 4, "members": 1, "subscribers": 1, "sockets": 1, "files": 1}
        assert left(store) == expected
        assert alive.get(PATIENCE) == ("t", 2498)
    assert left(store) == NOTHING


def age_sockets(store) -> None:
    for path in (store.backend.directory / "inboxes").iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)


def test_upkeep_keeps_the_sockets_of_the_living(store):
    """Of those who are about to subscribe, too, however old their sockets look."""
    folder = wakeups.SocketFolder(store.backend.directory / "inboxes")
    about_to = wakeups.WakeupSocket(folder, "0123456789abcdef")
    with store.subscribe("t") as subscription:
        age_sockets(store)
        messages_of(store).wake_all()
        assert left(store)["sockets"] == 2
        assert store.publish("t", 1) == 1
        assert subscription.get(PATIENCE) == ("t", 1)
    assert about_to.silence()
    del about_to
    assert left(store) == NOTHING


def test_upkeep_makes_up_for_a_lost_wake_up(store, monkeypatch):
    """As when a publisher is killed between writing a message and waking its readers up."""
    with store.subscribe("t") as subscription:
        with monkeypatch.context() as patch:
            patch.setattr(wakeups.Waker, "wake", lambda self, names: [])
            store.publish("t", 1)
        with pytest.raises(DeadlineExceeded):
            subscription.get(0.01)
        messages_of(store).wake_all()
        assert subscription.get(PATIENCE) == ("t", 1)


def test_a_stopped_subscriber_holds_nobody_up(store, url):
    """It loses its oldest messages, and only it does."""
    child = Child(collect, url, 10, "t", maxsize=10).when_ready()
    stop(child.pid)
    with store.subscribe("t", maxsize=1000) as quick:
        start = time.monotonic()
        for number in range(1000):
            assert store.publish("t", number) == 2
            assert quick.get(PATIENCE).data == number
        assert time.monotonic() - start < PATIENCE / 2
        assert quick.dropped == 0
    child.send(signal.SIGCONT)
    assert child.value() == [list(range(990, 1000)), 990]


def test_many_who_do_not_read_keep_nobody_from_being_woken(store):
    """The kernel counts what lies in their sockets against the sender, whose buffer is small."""
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(store.subscribe("t", maxsize=5))
        reader = stack.enter_context(store.subscribe("t", maxsize=5))
        for number in range(40):
            assert store.publish("t", number) == 61
            assert reader.get(PATIENCE) == ("t", number)


def test_a_childs_children_do_not_keep_it_alive(store, url):
    """A socket that a forked child inherited would be open for as long as that lives."""

    def subscribe_and_fork(ready):
        subscription = open_store(url).subscribe("t")
        grandchild = os.fork()
        if not grandchild:
            ready()
            signal.pause()
        signal.pause()
        return subscription

    child = Child(subscribe_and_fork).when_ready()
    group = f"/proc/{child.pid}/task/{child.pid}/children"
    grandchild = int(Path(group).read_text())
    assert store.publish("t", 1) == 1
    child.kill()
    assert store.publish("t", 2) == 0
    os.kill(grandchild, signal.SIGKILL)


def test_a_started_program_does_not_keep_a_subscriber_alive(store):
    """It inherits no socket, even where it inherits what it can."""
    with store.subscribe("t"):
        store.publish("t", 1)
        program = start_program()
        folder = Path(f"/proc/{program.pid}/fd")
        inherited = [os.readlink(entry) for entry in folder.iterdir()]  # noqa: PTH115
        program.communicate(timeout=PATIENCE)
    own = [link for link in inherited if "messages" in link]
    assert own == []
    assert store.publish("t", 2) == 0


# What is left behind.


def test_short_subscriptions_leave_nothing(store):
    """Five hundred, closed, forgotten, or of stores that were closed."""
    for number in range(500):
        mine = open_store(f"lmdb://{store.backend.directory}") if number % 50 == 0 else store
        subscription = mine.subscribe(f"t{number % 7}", "large*", maxsize=number + 1)
        store.publish("large", b"x" * 100_000)
        if number % 2:
            subscription.close()
        del subscription
        if mine is not store:
            mine.close()
    gc.collect()
    assert store.publish("large", 1) == 0
    for number in range(7):
        store.publish(f"t{number}", 1)
    assert left(store) == NOTHING


def test_what_was_read_is_removed(store):
    """Not at once, but so that little is ever kept; large messages go when nothing else waits."""
    with store.subscribe("t", maxsize=10_000) as first, store.subscribe("t", maxsize=10_000) as two:
        for number in range(2000):
            store.publish("t", number)
        for subscription in (first, two):
            for number in range(2000):
                assert subscription.get(PATIENCE) == ("t", number)
        assert left(store)["messages"] < 500
        store.publish("t", b"x" * 100_000)
        assert left(store)["files"] == 1, "one file for both"
        assert len(first.get(PATIENCE).data) == 100_000
        with pytest.raises(DeadlineExceeded):
            first.get(0)
        assert left(store)["files"] == 1
        assert len(two.get(PATIENCE).data) == 100_000
        with pytest.raises(DeadlineExceeded):
            two.get(0)
        assert left(store)["files"] == 0
    assert left(store) == NOTHING


def test_removing_waits_for_no_other_writer(store):
    """Reading goes on while somebody else writes for long, and removes later."""
    file = messages_of(store)._bind()[1]
    with store.subscribe("t", maxsize=10_000) as subscription:
        for number in range(1000):
            store.publish("t", number)
        with guard_held_elsewhere(file):
            start = time.monotonic()
            for number in range(999):
                assert subscription.get(PATIENCE) == ("t", number)
            assert time.monotonic() - start < 20
            assert left(store)["messages"] > 1000
        for _ in range(10):
            store.publish("t", 1)
            subscription.get(PATIENCE)
        assert left(store)["messages"] < 500


@contextlib.contextmanager
def guard_held_elsewhere(file):
    """Have another thread write for as long as a block runs."""
    held, release = threading.Event(), threading.Event()

    def hold():
        assert file.guard.acquire(10)
        held.set()
        release.wait(PATIENCE)
        file.guard.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(PATIENCE)
    try:
        yield
    finally:
        release.set()
        thread.join()


def test_closed_stores_leave_no_descriptors(url):
    """However often they are opened for messages."""

    def use() -> None:
        store = open_store(url)
        subscription = store.subscribe("t")
        store.publish("t", b"x" * 100_000)
        subscription.get(PATIENCE)
        store.close()

    def count(ready) -> int:
        use()
        gc.collect()  # what the parent left for later
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            use()
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())) - before

    assert Child(count).value() == 0


def test_a_store_that_nobody_has_open_starts_without_messages(url):
    """What was left by those who were killed is gone, with its files and sockets."""

    def leave_behind(ready):
        store = open_store(url)
        store.set("k", 1)
        subscription = store.subscribe("t")
        store.publish("t", b"x" * 100_000)
        ready()
        signal.pause()
        subscription.close()

    Child(leave_behind).when_ready().kill()
    store = open_store(url)
    assert store.get("k") == 1
    assert not list(store.backend.directory.glob("messages*"))
    assert not (store.backend.directory / "inboxes").exists()
    with store.subscribe("t") as subscription:
        assert store.publish("t", 1) == 1
        assert subscription.get(PATIENCE) == ("t", 1)
    store.close()


def test_a_store_that_is_open_elsewhere_keeps_its_messages(store, url):
    """Another process that opens it leaves them alone."""
    with store.subscribe("t") as subscription:
        store.publish("t", 1)

        def publish(ready) -> int:
            return open_store(url).publish("t", 2)

        assert Child(publish).value() == 1
        assert [subscription.get(PATIENCE).data for _ in range(2)] == [1, 2]


# Places and limits.


def test_a_directory_may_have_a_long_name(tmp_path):
    """Longer than the address of a socket may be."""
    place = tmp_path.joinpath(*["long" * 20] * 3)
    store = open_store(f"lmdb://{place}/store")
    with store.subscribe("t") as subscription:
        assert store.publish("t", 1) == 1
        assert subscription.get(PATIENCE) == ("t", 1)

        def publish(ready) -> int:
            return store.publish("t", 2)

        assert Child(publish).value() == 1
        assert subscription.get(PATIENCE) == ("t", 2)
    assert left(store) == NOTHING
    store.close()


def test_a_mailbox_holds_so_many_bytes(store):
    """The oldest give way, but the newest stays however large it is."""
    inbox = store.backend.subscribe(Topics((b"t",), ()), 1000)
    third = bytes(INBOX_BYTES // 3)
    for _ in range(3):
        store.backend.publish(b"t", third)
    assert inbox.dropped == 1
    store.backend.publish(b"t", bytes(INBOX_BYTES + 1))
    assert inbox.dropped == 3
    assert len(inbox.take()[1]) == INBOX_BYTES + 1
    assert inbox.take() is None
    inbox.close()
    assert left(store) == NOTHING


def test_many_small_messages_give_way_to_a_large_one_bit_by_bit(store, monkeypatch):
    """So that no writer waits for long; the count is exact in the end."""
    monkeypatch.setattr(mailboxes, "INBOX_BYTES", 200 * KIB)
    inbox = store.backend.subscribe(Topics((b"t",), ()), 100_000)
    for _ in range(3000):
        store.backend.publish(b"t", b"")
    assert inbox.dropped == 0
    for number in range(6):
        store.backend.publish(b"t", bytes(190 * KIB))
        assert inbox.dropped <= 1000 * (number + 1)
    assert inbox.dropped == 3005
    assert len(inbox.take()[1]) == 190 * KIB
    assert inbox.take() is None
    inbox.close()


def test_a_full_file_is_an_error_of_the_publisher(url, monkeypatch):
    """Which says what to do; subscribers get what is there, and there is room again."""
    monkeypatch.setattr(lmdb_files, "_MESSAGES_MAP", 1024 * KIB)
    store = open_store(url)
    with store.subscribe("t", maxsize=10_000) as subscription:

        def fill() -> None:
            while True:
                published.append(store.publish("t", b"x" * 5000))

        published = []
        with pytest.raises(StoreFull, match="wait"):
            fill()
        for _ in published:
            subscription.get(PATIENCE)
        store.publish("t", 1)
        assert subscription.get(PATIENCE) == ("t", 1)
        assert subscription.dropped == 0
    store.close()


def test_a_missing_file_is_a_dropped_message(store):
    """As when somebody deleted it; the next message comes."""
    with store.subscribe("t") as subscription:
        store.publish("t", b"x" * 100_000)
        for path in (store.backend.directory / "messages.blobs").iterdir():
            path.unlink()
        store.publish("t", 1)
        assert subscription.get(PATIENCE) == ("t", 1)
        assert subscription.dropped == 1


# Writers that stop.


def test_a_stopped_writer_makes_publishing_fail_in_time(store, url):
    """And subscribing; reading goes on."""

    def hold(ready):
        file = messages_of(open_store(url))._bind()[1]
        assert file.guard.acquire(10)
        ready()
        signal.pause()

    impatient = open_store(url, timeout=0.2)
    with store.subscribe("t") as subscription:
        store.publish("t", 1)
        child = Child(hold).when_ready()
        for attempt in (
            lambda: impatient.publish("t", 2),
            lambda: impatient.subscribe("t"),
            lambda: asyncio.run(impatient.apublish("t", 2)),
        ):
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="has been writing"):
                attempt()
            assert 0.2 <= time.monotonic() - start < 10
        assert impatient.publish("nobody", 1) == 0
        assert subscription.get(PATIENCE) == ("t", 1)
        child.kill()
        assert store.publish("t", 3) == 1
        assert subscription.get(PATIENCE) == ("t", 3)
    impatient.close()


async def test_a_busy_writer_does_not_stop_an_event_loop(store):
    """Publishing, subscribing and reading let other tasks run while they wait."""
    subscription = await store.asubscribe("t")
    await store.apublish("t", 1)
    file = messages_of(store)._bind()[1]
    longest, done = 0.0, False

    async def tick():
        nonlocal longest
        while not done:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    with guard_held_elsewhere(file):
        publishing = asyncio.create_task(store.apublish("t", 2))
        subscribing = asyncio.create_task(store.asubscribe("u").aopen())
        assert await subscription.aget(PATIENCE) == ("t", 1)
        await asyncio.sleep(0.3)
        assert not publishing.done()
        assert not subscribing.done()
    assert await publishing == 1
    await (await subscribing).aclose()
    assert await subscription.aget(PATIENCE) == ("t", 2)
    done = True
    await ticking
    assert longest < 10, f"the loop stood still for {longest:.3f} s"
    await subscription.aclose()
