"""Messages: how long one takes to reach eight processes, what publishing costs, how many a second.

python benchmarks/messages.py --rounds 10

A subscriber is a process of its own. The time of a delivery runs from just before `publish` in one
process to just after `get` has returned in the other, by the clock that all processes share. On
two cores nine processes wait for each other most of that time: so beside the store there are bare
datagrams, one sent to each subscriber, which is the least that any way of waking them can cost.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, environment, note, parser, redis_server, report, rotated, summary

from hornbeam_state import open_store

MANY = 8
EMBEDDED, DATAGRAMS, REDIS = "hornbeam-lmdb", "bare datagrams", "hornbeam-redis"
TOPICS = {"nobody": 0, "one": 1, "many": MANY}


def main() -> None:
    if sys.argv[1:2] == ["subscriber"]:
        subscriber(*sys.argv[2:])
        return
    options = parser(__doc__.partition("\n")[0])
    options.set_defaults(rounds=10)
    options.add_argument("--messages", type=int, default=300, help="deliveries timed in a turn")
    options.add_argument("--pause", type=float, default=0.004, help="seconds between two of them")
    options.add_argument("--flood", type=int, default=5000, help="messages sent without a pause")
    options.add_argument("--bytes", type=int, default=100, help="size of a message, about")
    options.add_argument("--redis", action="store_true", help="measure a Redis as well")
    args = options.parse_args()

    machine = environment("lmdb", "redis")
    with contextlib.ExitStack() as stack:
        contenders = make_contenders(stack, redis=args.redis)
        rounds = measure(contenders, args)
    report(
        {
            "benchmark": "messages",
            "options": {name: getattr(args, name) for name in ("rounds", "messages", "bytes")},
            "environment": machine,
            **figures(rounds),
        },
        args.out,
    )


def make_contenders(stack, *, redis):
    """Return by name what publishes, with its subscribers running."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-bench-")))
    urls = {EMBEDDED: f"lmdb://{directory}/store", DATAGRAMS: f"datagrams:{directory}"}
    if redis:
        urls[REDIS] = f"unix://{stack.enter_context(redis_server())[1]}"
    return {name: stack.enter_context(Contender(url)) for name, url in urls.items()}


class Contender:
    """A publisher and its subscribers, for the length of a block."""

    def __init__(self, url):
        self.store = open_bus(url)
        self.subscribers = {
            topic: [start_subscriber(url, topic, number) for number in range(count)]
            for topic, count in TOPICS.items()
        }

    def __enter__(self):
        for children in self.subscribers.values():
            for child in children:
                child.stdout.readline()
        return self

    def __exit__(self, *_):
        for children in self.subscribers.values():
            for child in children:
                child.kill()
                child.wait()
                child.stdout.close()
        self.store.close()

    def answers(self, topic):
        """Have each subscriber of a topic tell what it has seen since it was last asked."""
        self.store.publish(topic, message(b"r", 0))
        return [json.loads(child.stdout.readline()) for child in self.subscribers[topic]]

    def pace(self, topic, count, pause, content):
        """Publish with pauses; return the microseconds of each call and of each delivery."""
        calls = []
        for _ in range(count):
            start = time.perf_counter_ns()
            self.store.publish(topic, message(b"t", start, content))
            calls.append((time.perf_counter_ns() - start) / 1000)
            time.sleep(pause)
        return calls, [one for answer in self.answers(topic) for one in answer["taken"]]

    def flood(self, topic, count, content):
        """Publish without a pause; return how many messages a second reached everybody."""
        start = time.perf_counter()
        for number in range(count):
            self.store.publish(topic, message(b"c", number, content))
        answers = self.answers(topic)
        elapsed = time.perf_counter() - start
        for answer in answers:
            if (answer["count"], answer["dropped"]) != (count, 0):
                raise RuntimeError(f"of {count} messages a subscriber got {answer['count']}")
        return count / elapsed


def message(kind, number, content=b""):
    return kind + number.to_bytes(8) + content


def start_subscriber(url, topic, number):
    return subprocess.Popen(
        [sys.executable, __file__, "subscriber", url, topic, str(number)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def subscriber(url, topic, number):
    """Take messages until killed; tell what came whenever a message asks for it."""
    subscription = open_bus(url).subscribe(topic, number)
    print("ready", flush=True)
    taken, count = [], 0
    while True:
        data = subscription.get().data
        now = time.perf_counter_ns()
        if data[:1] == b"t":
            taken.append((now - int.from_bytes(data[1:9])) / 1000)
        elif data[:1] == b"c":
            count += 1
        else:
            seen = {"taken": taken, "count": count, "dropped": subscription.dropped}
            print(json.dumps(seen), flush=True)
            taken, count = [], 0


def open_bus(url):
    return Datagrams(url) if url.startswith("datagrams:") else Bus(open_store(url, timeout=30))


class Bus:
    """A store, as far as messages go."""

    def __init__(self, store):
        self._store = store
        self.publish = store.publish
        self.close = store.close

    def subscribe(self, topic, _number):
        return self._store.subscribe(topic, maxsize=10**6)


class Datagrams:
    """Sockets in a directory: a message is copied to each, and waits where one is full."""

    dropped = 0

    def __init__(self, url):
        self._directory = url.partition(":")[2]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.close = self._socket.close

    def publish(self, topic, data):
        for number in range(TOPICS[topic]):
            self._socket.sendto(data, f"{self._directory}/{topic}{number}")

    def subscribe(self, topic, number):
        self._socket.bind(f"{self._directory}/{topic}{number}")
        return self

    def get(self):
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.poll()
        self.data = self._socket.recv(65536)
        return self


def measure(contenders, args):
    """Let the contenders take turns; return by name what each round gave."""
    content = b"x" * args.bytes
    rounds = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.pace("many", 50, args.pause, content)
    for turn in range(args.rounds):
        note(f"round {turn + 1} of {args.rounds}")
        for name in rotated(list(contenders), turn):
            one, seen = contenders[name], {}
            for topic, count in TOPICS.items():
                calls, taken = one.pace(topic, args.messages, args.pause, content)
                seen[f"publish to {count}"] = statistics.median(calls)
                if taken:
                    seen[f"delivery to {count}"] = statistics.median(taken)
                    seen[f"delivery to {count}, 99 of 100"] = statistics.quantiles(taken, n=100)[98]
            seen["messages"] = one.flood("many", args.flood, content)
            rounds[name].append(seen)
    return rounds


def figures(rounds):
    """Return each figure of each contender over the rounds, and whether the target is met."""
    kinds = [kind for kind in next(iter(rounds.values()))[0] if kind != "messages"]
    taken = {
        kind: {
            name: summary([one[kind] for one in seen if kind in one])
            for name, seen in rounds.items()
        }
        for kind in kinds
    }
    median = taken[f"delivery to {MANY}"][EMBEDDED]["median"]
    return {
        "microseconds": taken,
        f"messages_per_second_to_{MANY}_that_keep_up": {
            name: summary([one["messages"] for one in seen], 0) for name, seen in rounds.items()
        },
        "targets": {f"median delivery to {MANY} processes under 200 microseconds": median < 200},
    }


if __name__ == "__main__":
    main()
