"""What workers know of each other, and what they decide by it."""

from __future__ import annotations

import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest

from hornbeam_ml.lifecycle import board as board_module
from hornbeam_ml.lifecycle.board import Board, Row, State
from hornbeam_ml.lifecycle.handover import Handover, Verdict, arbiter_stopped, verdict
from hornbeam_ml.lifecycle.recycling import Limits, may_leave, memory_limit
from hornbeam_ml.memory import resident_bytes
from hornbeam_state.errors import ConfigError

BOOTING, PAUSED, READY, RETIRING, LEAVING, GONE, STOPPED, FAILED = State
STAY, LEAVE, VOID = Verdict


class Tmp:
    """gunicorn's file of a worker: closed when the arbiter has reaped that."""

    def __init__(self):
        self.closed = False

    def fileno(self):
        if self.closed:
            raise ValueError
        return 1


class Server:
    """An arbiter that forks children which take a slot and wait."""

    def __init__(self):
        self.board = Board()
        self.children = []
        self.cfg = None
        self.hang_up()

    def hang_up(self, workers=2):
        self.cfg = SimpleNamespace(workers=workers)

    def seat(self):
        age = len(self.children) + 1
        worker = SimpleNamespace(age=age, tmp=Tmp(), sockets=[], pid=0)
        worker.slot = self.board.seat(worker, self.cfg)
        self.children.append(worker)
        return worker

    def fork(self, *states):
        worker = self.seat()
        told, tell = os.pipe()
        worker.pid = os.fork()
        if not worker.pid:
            self.board.take(worker.slot)
            for state in states:
                self.board.say(state)
            os.write(tell, b"x")
            signal.pause()
            os._exit(0)
        assert os.read(told, 1) == b"x"
        os.close(told)
        os.close(tell)
        return worker

    def kill(self, worker, *, reap=True):
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        worker.pid = 0
        if reap:
            worker.tmp.closed = True

    def shown(self):
        return [(r.slot, r.age, r.generation, r.state) for r in self.board.workers()]


@pytest.fixture
def server():
    made = Server()
    yield made
    for child in made.children:
        if child.pid:
            made.kill(child)


# The board.


def test_workers_see_each_other(server):
    one, two = server.fork(READY), server.fork()
    assert server.shown() == [(0, 1, 1, READY), (1, 2, 1, BOOTING)]
    assert [row.pid for row in server.board.workers()] == [one.pid, two.pid]
    assert server.board.ever_ready
    assert time.monotonic() - server.board.workers()[0].since < 30


def test_a_killed_worker_is_dead_at_once_and_its_row_stays(server):
    one = server.fork(READY)
    server.kill(one, reap=False)
    assert server.shown() == []
    assert [(row.state, row.alive) for row in server.board.rows()] == [(READY, False)]


def test_the_lowest_free_slot_is_given_out(server):
    workers = [server.fork() for _ in range(3)]
    server.kill(workers[1], reap=False)
    assert server.fork().slot == 3  # nobody has reaped it
    workers[1].tmp.closed = True
    assert server.fork().slot == 1
    assert server.fork().slot == 4


def test_another_configuration_is_another_generation(server):
    server.fork(READY)
    server.fork()
    server.hang_up(workers=5)
    server.fork()
    assert [row.generation for row in server.board.workers()] == [1, 1, 2]
    assert (server.board.generation, server.board.wanted) == (2, 5)


def test_failed_boots_are_counted_until_one_succeeds(server):
    """Those that died without a word too; not those of an older generation."""
    for states, failures in (([FAILED], 1), ([], 2), ([STOPPED], 2), ([READY], 0)):
        server.kill(server.fork(*states))
        server.seat()
        assert server.board.failures == failures
    server.kill(server.fork(FAILED))
    server.hang_up()
    server.seat()
    assert server.board.failures == 0


def test_one_decides_at_a_time(server):
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with server.board.deciding() as alone:
            os.write(tell, b"1" if alone else b"0")
            signal.pause()
        os._exit(0)
    assert os.read(told, 1) == b"1"
    with server.board.deciding() as alone:
        assert not alone
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with server.board.deciding() as alone:
        assert alone
    os.close(told)
    os.close(tell)


def test_a_worker_that_died_before_it_took_its_row_is_forgotten(server, monkeypatch):
    server.seat()
    assert server.shown() == [(0, 1, 1, BOOTING)]
    monkeypatch.setattr(board_module, "_BIRTH_S", 0.0)
    assert server.shown() == []


def test_outside_of_gunicorn_there_are_no_workers(monkeypatch):
    monkeypatch.setattr(board_module, "_board", None)
    assert board_module.workers() == []


def test_an_arbiter_that_closed_its_socket_has_stopped():
    """What cannot be seen does not count."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inode = os.fstat(listener.fileno()).st_ino
        assert not arbiter_stopped(os.getpid(), inode)
    assert arbiter_stopped(os.getpid(), inode)
    assert not arbiter_stopped(os.getpid(), 0)
    assert not arbiter_stopped(2**22 + 1, inode)


# Handing over.


def row(age, state, generation=2, *, alive=True, since=0.0):
    return Row(
        slot=age,
        age=age,
        pid=age,
        generation=generation,
        state=state,
        since=since,
        alive=alive,
    )


OLD = [row(1, RETIRING, 1), row(2, RETIRING, 1)]


@pytest.mark.parametrize(
    ("newer", "answers"),
    [
        pytest.param([row(3, BOOTING), row(4, BOOTING)], [STAY, STAY], id="all-boot"),
        pytest.param([row(3, READY), row(4, BOOTING)], [LEAVE, STAY], id="one-for-one"),
        pytest.param([row(3, READY), row(4, READY)], [LEAVE, LEAVE], id="all-ready"),
        pytest.param([row(3, READY), row(4, FAILED)], [LEAVE, LEAVE], id="some-failed"),
        pytest.param([row(3, READY), row(4, PAUSED)], [LEAVE, LEAVE], id="some-pause"),
        pytest.param([row(3, FAILED), row(4, BOOTING)], [STAY, STAY], id="one-failed-so-far"),
        pytest.param([row(3, FAILED), row(4, FAILED)], [VOID, VOID], id="all-failed"),
        pytest.param(
            [row(3, FAILED, alive=False), row(4, BOOTING, alive=False)],
            [VOID, VOID],
            id="failed-and-crashed",
        ),
        pytest.param([row(3, PAUSED)], [VOID, VOID], id="tried-again"),
        pytest.param(
            [row(3, STOPPED, alive=False), row(4, STOPPED)], [LEAVE, LEAVE], id="server-stops"
        ),
        pytest.param([row(3, STOPPED), row(4, BOOTING)], [STAY, STAY], id="one-was-stopped"),
        pytest.param([row(3, READY, alive=False)], [STAY, STAY], id="killed-to-be-replaced"),
        pytest.param([], [STAY, STAY], id="not-forked-yet"),
    ],
)
def test_old_workers_leave_when_new_ones_are_ready(newer, answers):
    assert [verdict(own, [*OLD, *newer], 2, 2) for own in OLD] == answers


def test_the_oldest_leaves_first_and_leaving_counts_once():
    """A worker that has left already made the room for the first one that is ready."""
    rows = [row(1, LEAVING, 1), OLD[1], row(3, READY), row(4, BOOTING)]
    assert verdict(OLD[1], rows, 2, 2) is STAY
    gone = [row(1, GONE, 1, alive=False), *rows[1:]]
    assert verdict(OLD[1], gone, 2, 2) is STAY


def test_a_smaller_server_keeps_old_workers_until_one_is_ready():
    assert [verdict(own, [*OLD, row(3, BOOTING)], 2, 1) for own in OLD] == [STAY, STAY]
    assert [verdict(own, [*OLD, row(3, READY)], 2, 1) for own in OLD] == [LEAVE, LEAVE]


def test_without_a_newer_generation_a_worker_leaves_at_once():
    assert verdict(row(2, READY), [*OLD, row(2, READY)], 2, 2) is LEAVE


def test_only_the_newest_generation_counts():
    """After a second SIGHUP those of the first may be stopped while they boot."""
    rows = [*OLD, row(3, STOPPED, 2, alive=False), row(4, BOOTING, 3)]
    assert verdict(OLD[0], rows, 3, 1) is STAY


def test_what_was_asked_is_void_when_the_new_version_cannot_boot():
    """Said once; what the arbiter repeats because of it changes nothing; then it is obeyed."""
    old = Handover()
    assert not old.ask(10.0, 2, newer_exist=True)
    assert old.settle(10.1, STAY, 2, newer_exist=True) is STAY
    assert old.settle(10.5, VOID, 2, newer_exist=True) is STAY  # the server may be stopping
    assert old.settle(11.1, VOID, 2, newer_exist=True) is VOID
    assert not old.asked
    assert not old.ask(11.5, 2, newer_exist=True)
    assert old.settle(12.6, VOID, 2, newer_exist=False) is STAY
    assert not old.asked
    assert old.ask(13.7, 2, newer_exist=False)


def test_after_a_void_request_another_generation_is_waited_for():
    old = Handover()
    old.ask(10.0, 2, newer_exist=True)
    assert old.settle(12.0, VOID, 2, newer_exist=False) is VOID
    assert not old.ask(20.0, 3, newer_exist=True)
    assert old.asked
    assert old.settle(20.1, LEAVE, 3, newer_exist=True) is LEAVE


# Recycling.


@pytest.mark.parametrize(
    ("others", "wanted", "waited", "answer"),
    [
        pytest.param([row(2, READY)], 2, 0, True, id="another-is-ready"),
        pytest.param([row(2, BOOTING)], 2, 99, False, id="the-other-boots"),
        pytest.param([row(2, READY), row(3, BOOTING)], 3, 99, False, id="one-boots"),
        pytest.param([row(2, READY), row(3, LEAVING)], 3, 99, False, id="one-leaves"),
        pytest.param([row(2, READY), row(3, GONE)], 3, 99, False, id="one-is-about-to-end"),
        pytest.param([row(2, READY), row(3, PAUSED)], 3, 99, False, id="one-cannot-boot"),
        pytest.param([row(2, RETIRING, 1)], 2, 99, False, id="the-other-is-old"),
        pytest.param([], 1, 0, True, id="the-only-one"),
        pytest.param([], 2, 0, False, id="the-other-is-to-come"),
        pytest.param([], 2, 99, True, id="alone-for-long"),
        pytest.param(
            [row(2, READY), row(3, GONE, alive=False, since=99.5)], 3, 0, False, id="one-just-left"
        ),
        pytest.param(
            [row(2, READY), row(3, GONE, alive=False, since=96.0)], 3, 0, True, id="one-left"
        ),
    ],
)
def test_one_worker_is_replaced_at_a_time(others, wanted, waited, answer):
    own = row(1, READY)
    assert may_leave(own, [own, *others], wanted, 100.0, 100.0 - waited) is answer


@pytest.mark.parametrize(
    ("text", "size"),
    [("", None), ("1000", 1000), ("800M", 800 * 2**20), ("1.5g", 3 * 2**29), ("2 GiB", 2**31)],
)
def test_memory_limits(text, size):
    assert memory_limit({"HORNBEAM_MAX_RSS": text}) == size


@pytest.mark.parametrize("text", ["much", "-1", "0", "1.5.2M", "10%"])
def test_what_is_no_memory_limit_is_refused(text):
    with pytest.raises(ConfigError, match="HORNBEAM_MAX_RSS="):
        memory_limit({"HORNBEAM_MAX_RSS": text})


def test_limits():
    assert Limits(None, None).exceeded(10**9, 0) is None
    assert Limits(10, None).exceeded(9, 0) is None
    assert Limits(10, None).exceeded(10, 0) == "10 requests, the limit is 10"
    resident = resident_bytes()
    assert resident > 2**20
    assert Limits(None, resident * 4).exceeded(0, 1) is None
    limits = Limits(None, 2**20)
    assert limits.exceeded(0, 1).endswith("MiB are resident, HORNBEAM_MAX_RSS is 1 MiB")
    assert limits.exceeded(0, 1.5) is None  # it looks once a second
    assert limits.exceeded(0, 2) is not None


def test_a_limit_below_the_size_of_a_new_worker_is_given_up():
    """One that replaces it would be as large."""
    limits = Limits(10, 2**20)
    assert "HORNBEAM_MAX_RSS is 1 MiB" in limits.give_up_memory()
    assert limits.exceeded(0, 1) is None
    assert limits.exceeded(10, 1) is not None
    assert Limits(None, resident_bytes() * 4).give_up_memory() is None
