"""Frames on their way into a socket."""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hornbeam_state.transports.local.frames import Frame

_MOST_AT_ONCE: Final = 2**20
_MOST_BUFFERS: Final = 1024  # IOV_MAX of Linux


class Outbox:
    """Frames in the order in which they are sent. Nothing here waits, or is safe in threads.

    Attributes:
        bytes: How many wait.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._frames: deque[Frame] = deque()

    def push(self, frame: Frame) -> None:
        """Add a frame behind the others."""
        self._frames.append(frame)
        self.bytes += frame.left

    def remove(self, frame: Frame) -> bool:
        """Take a frame out again; return whether not a byte of it was sent."""
        if frame.begun or frame not in self._frames:
            return False
        self._frames.remove(frame)
        self.bytes -= frame.left
        return True

    def flush(self, sock: socket.socket) -> bool:
        """Send what the socket takes now, within reason; return whether that was all.

        Raises:
            OSError: the connection is lost.
        """
        enough = self.bytes - _MOST_AT_ONCE
        while self._frames:
            if self.bytes < enough:
                return False  # the other side keeps up, and the caller has other things to do
            try:
                sent = sock.sendmsg(self._gather(), (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            self._note_sent(sent)
        return True

    def _gather(self) -> list[bytes | memoryview]:
        first = self._frames[0]
        if len(self._frames) == 1 and len(first.buffers) <= _MOST_BUFFERS:
            return first.buffers
        buffers = (one for frame in self._frames for one in frame.buffers)
        return list(islice(buffers, _MOST_BUFFERS))

    def _note_sent(self, count: int) -> None:
        self.bytes -= count
        while count:
            frame = self._frames[0]
            frame.begun = True
            if count < frame.left:
                frame.skip(count)
                return
            count -= frame.left
            frame.buffers = []  # the frame may be kept, but not the arrays
            self._frames.popleft()
