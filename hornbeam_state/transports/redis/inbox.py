"""Reading the answers to all calls of a process, by whoever waits for one, else by a thread."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis.batches import Command
from hornbeam_state.errors import StoreError
from hornbeam_state.transports.redis.envelope import fields_of
from hornbeam_state.transports.redis.line import Line, LineLost
from hornbeam_state.transports.redis.pending import Pending
from hornbeam_state.waking import Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hornbeam_state.backends.redis.link import Link
    from hornbeam_state.transports.redis.keys import InboxKeys
    from hornbeam_state.transports.waiting import ThreadWaker

logger = logging.getLogger("hornbeam.transport")

ALIVE_MS: Final = 10_000
"""How long a node believes that a process still reads its answers."""

_BLOCK_S: Final = 1.0
_ALIVE_EVERY_S: Final = 1.0
_LINGER_S: Final = 0.01
_LEAVING_S: Final = 2.0
_MOST_ENTRIES: Final = 256
_JOIN_S: Final = 2.0


_Question = tuple[Command, "Callable[[Any], None]"]


class InboxReader:
    """Reads the inbox of this process, whatever happens to the server.

    One thread reads at a time: a caller that blocks, which saves it being woken by another thread;
    else our own, while somebody waits who cannot read.

    What was read is deleted with the next question, so that the inbox holds what is unread, and
    what was read is at its beginning again when that question was lost.

    Args:
        link: Connections to the servers.
        keys: Where the inbox lies.
        timeout: Seconds that a server has for an answer.
        waiting: The calls that have no answer yet.
        take: Called with the fields of entries that arrived, and the call whose caller reads;
            returns whether our thread is likely to be needed again soon.
        lose: Called when the thread ends by a fault of ours.
    """

    def __init__(
        self,
        link: Link,
        keys: InboxKeys,
        timeout: float,
        *,
        waiting: dict[int, Pending],
        take: Callable[[list[dict[bytes, bytes]], Pending | None], bool],
        lose: Callable[[BaseException], None],
    ) -> None:
        self._keys = keys
        self._waiting = waiting
        self._take = take
        self._lose = lose
        self._line = Line(link, keys.bucket, timeout)
        self._asked: deque[Callable[[Any], None]] = deque()  # what to do with each reply
        self._closing = False
        self._is_away = False  # which is said once
        self._last: bytes | None = None
        self._alive_at = 0.0
        # Who reads, under one key. A dictionary, since an interrupted caller can tell from it
        # whether it had got the place, which a lock does not say.
        self._place: dict[None, object] = {}
        self._caller: Pending | None = None  # who reads, unless it is our thread
        self._leaving: object = None  # who has been in that place, and since when
        self._leaving_at = 0.0
        self._gate = Gate()  # of the thread, while it does not read
        self._linger_until = 0.0
        self._thread = threading.Thread(target=self._run, name="hornbeam-inbox", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the thread, and must not wait for it."""
        return threading.current_thread() is self._thread

    def need(self) -> None:
        """See to it that somebody reads: a call was made whose caller cannot."""
        if not self._place:
            self._gate.open()

    def add_and_read(
        self, call: Pending, waker: ThreadWaker, add: Command, added: Callable[[Any], None]
    ) -> bool:
        """Send a call together with the question for its answer, and read as `read_for` does.

        Args:
            call: The call.
            waker: Its waker.
            add: What sends it.
            added: Called with the reply to that, by whoever reads it; with a `LineLost` if there
                will be none.

        Returns:
            False if nothing was sent: another reads, or the connection is lost or in use.
        """
        with self._reading(call, waker) as is_reader:
            if is_reader and self._line.is_open and not self._asked:
                self._line.take(0.0)  # or the loss of an idle connection would look like ours
                call.tried = True
                self._ask((add, added))
                self._read_until_done(call)
        return call.tried

    def read_for(self, call: Pending, waker: ThreadWaker) -> None:
        """Read on the thread of a caller until its call is done, or its deadline passed.

        Returns at once while another reads, or the server is away: then wait to be woken.
        """
        with self._reading(call, waker) as is_reader:
            if is_reader:
                self._read_until_done(call)

    def close(self) -> None:
        """End the thread, and wait a moment for that."""
        self._closing = True
        self._line.close()
        self._gate.open()
        if not self.is_own_thread:
            self._thread.join(_JOIN_S)

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the parent's connection."""
        self._closing = True
        self._line.end()

    # On the thread of a caller.

    @contextlib.contextmanager
    def _reading(self, call: Pending, waker: ThreadWaker) -> Iterator[bool]:
        # Before a look at the call: nothing that is done goes unnoticed.
        waker.bell = self._line.bell
        try:
            is_reader = self._place.setdefault(None, call) is call
            if is_reader:
                self._caller = call
            yield is_reader
        except LineLost as error:
            self._give_up(error)  # the thread opens it again
        except BaseException:
            if self._place.get(None) is call:
                self._asked.clear()
                self._line.drop()  # interrupted anywhere: what was read is read again
            raise
        finally:
            waker.bell = None
            if self._place.get(None) is call:
                self._caller = None
                del self._place[None]
                if self._waiting or not self._line.is_open:
                    self._gate.open()

    def _read_until_done(self, call: Pending) -> None:
        while not call.done and self._line.is_open:
            left = call.deadline - time.monotonic()
            if left <= 0:
                return
            self._read(min(left, _BLOCK_S))

    # On our thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._place.setdefault(None, self) is self:
                    try:
                        self._serve()
                    finally:
                        del self._place[None]
                if self._place or not self._waiting:
                    self._gate.wait(_ALIVE_EVERY_S)
                    self._evict(time.monotonic())
        except BaseException as error:
            logger.exception("the inbox of this process ended by an internal error")
            self._lose(error)
        finally:
            self._line.end()

    def _evict(self, now: float) -> None:
        """Free the place of a caller that was interrupted while it left."""
        reader = self._place.get(None)
        if reader is not self._leaving:
            self._leaving, self._leaving_at = reader, now
        elif isinstance(reader, Pending) and reader.done and now > self._leaving_at + _LEAVING_S:
            logger.warning("a caller was interrupted at the worst moment: others read again")
            self._line.drop()
            self._asked.clear()
            self._place.clear()

    def _serve(self) -> None:
        """Read until nobody waits, or the connection is lost."""
        try:
            if not self._line.is_open:
                self._line.open()
                self._last, self._alive_at = None, 0.0
            while not self._closing and (self._waiting or time.monotonic() < self._linger_until):
                self._read(_BLOCK_S if self._waiting else _LINGER_S)
            self._stay_alive()
        except (StoreError, LineLost) as error:
            self._give_up(error)
            if self._closing:
                return
            if not self._is_away:
                logger.warning("the answers to calls cannot be read for now: %s", error)
            self._is_away = True
            self._line.pause()

    def _stay_alive(self) -> None:
        """While nobody waits: say that we are here, and look whether the server still is."""
        if not self._asked and time.monotonic() >= self._alive_at:
            self._send(self._chores())
        while self._asked and not self._closing:
            self._read(_BLOCK_S)

    # On the thread of who reads.

    def _read(self, seconds: float) -> None:
        """Wait for answers, and give them to the calls; ask for them, unless that was done."""
        if not self._asked:
            self._ask()
        for reply in self._line.take(seconds):
            self._asked.popleft()(reply)
            self._is_away = False

    def _ask(self, *first: _Question) -> None:
        """Ask for answers, after other things."""
        limits = (b"COUNT", b"%d" % _MOST_ENTRIES, b"BLOCK", b"%d" % (_BLOCK_S * 1000))
        words = (b"XREAD", *limits, b"STREAMS", self._keys.inbox, b"0-0")
        read = (Command(words, self._keys.bucket), self._found)
        self._send([*first, *self._chores(), read])

    def _send(self, questions: Sequence[_Question]) -> None:
        self._asked.extend(done for _, done in questions)
        self._line.ask(*(command for command, _ in questions), wait=_BLOCK_S)

    def _chores(self) -> list[_Question]:
        """Return what goes along with a question: to delete what was read, to say we are here."""
        keys, bucket, now = self._keys, self._keys.bucket, time.monotonic()
        chores: list[_Question] = []
        if self._last is not None:
            first, _, second = self._last.partition(b"-")
            following = b"%b-%d" % (first, int(second) + 1)
            trim = Command((b"XTRIM", keys.inbox, b"MINID", following), bucket)
            chores.append((trim, _check))
            self._last = None
        if now >= self._alive_at:
            words = (b"SET", keys.alive, b"1", b"PX", b"%d" % ALIVE_MS)
            chores.append((Command(words, bucket), _check))
            self._alive_at = now + _ALIVE_EVERY_S
        return chores

    def _found(self, reply: Any) -> None:
        _check(reply)
        if reply:
            entries = reply[0][1]
            lingers = self._take([fields_of(entry) for _, entry in entries], self._caller)
            self._last = entries[-1][0]  # not before: a caller may be interrupted
            if lingers:
                self._linger_until = time.monotonic() + _LINGER_S

    def _give_up(self, error: Exception) -> None:
        """After the loss of the connection: there will be no more replies."""
        self._line.drop()
        asked, self._asked = self._asked, deque()
        for done in asked:
            with contextlib.suppress(LineLost):
                done(error)


def _check(reply: Any) -> None:
    if isinstance(reply, Exception):
        raise LineLost(str(reply)) from reply
