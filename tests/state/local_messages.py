"""A backend whose messages stay within this process, for tests of what is built upon messages."""

from __future__ import annotations

import os
from collections import deque

from hornbeam_state.backends.embedded import EmbeddedBackend


class LocalInbox:
    """Messages in a list, with a descriptor that is readable while there are any."""

    dropped = gaps = 0

    def __init__(self, topics) -> None:
        self.topics = topics
        self.closed = False
        self._messages = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self._bell)

    def put(self, message) -> None:
        self._messages.append(message)
        os.eventfd_write(self._bell, 1)

    def take(self):
        if not self._messages and not self.closed:
            try:
                os.eventfd_read(self._bell)
            except BlockingIOError:
                return None
        return self._messages.popleft() if self._messages else None

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        self.closed = True
        self._messages.clear()
        os.eventfd_write(self._bell, 1)


class LocalMessages(EmbeddedBackend):
    """An embedded store, with messages of this process."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.inboxes = []

    def publish(self, topic, payload):
        reached = [box for box in self.inboxes if not box.closed and box.topics.match(topic)]
        for inbox in reached:
            inbox.put((topic, payload))
        return len(reached)

    async def apublish(self, topic, payload):
        return self.publish(topic, payload)

    def subscribe(self, topics, maxsize):
        self.inboxes.append(LocalInbox(topics))
        return self.inboxes[-1]

    async def asubscribe(self, topics, maxsize):
        return self.subscribe(topics, maxsize)
