"""A model host that is killed again and again under load: nobody hangs, nothing is wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import httpx
import pytest
from gunicorn_process import Gunicorn

pytestmark = pytest.mark.slow

KILLS = 20
CLIENTS = 8
LONGEST_S = 10.0

MODELS = """
import os, time
from hornbeam_ml import Serving

def load():
    time.sleep(0.2)
    def model(batch):
        time.sleep(0.005)
        return [[item, os.getpid()] for item in batch]
    return model

pairs = Serving(load, name="pairs")
"""

APP = """
from fastapi import FastAPI
from killed_models import pairs

app = FastAPI()

@app.get("/async/{item}")
async def run(item: str):
    return await pairs.arun(item)

@app.get("/sync/{item}")
def run_sync(item: str):
    return pairs.run(item)
"""


class Load:
    """Clients that ask all the time, and count every response."""

    def __init__(self, url):
        self.url = url
        self.counts = Counter()
        self.slowest = 0.0
        self.problems = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_exc):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def run(self, number):
        kind = "sync" if number % 2 else "async"
        with httpx.Client(timeout=30) as client:
            count = 0
            while not self.over.is_set():
                item = f"{number}-{count}"
                count += 1
                start = time.monotonic()
                answer = client.get(f"{self.url}/{kind}/{item}")
                self.slowest = max(self.slowest, time.monotonic() - start)
                self.counts[answer.status_code] += 1
                if answer.status_code == 200 and answer.json()[0] != item:
                    self.problems.append((item, answer.text))
                elif answer.status_code == 503 and "retry-after" not in answer.headers:
                    self.problems.append((item, dict(answer.headers)))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_host_is_killed_under_load(tmp_path, processes):
    (tmp_path / "killed_models.py").write_text(MODELS)
    (tmp_path / "app.py").write_text(APP)
    env = {
        "HORNBEAM_HOST": "killed_models",
        "HORNBEAM_HOST_WORKERS": str(processes),
        "HORNBEAM_STORE": f"lmdb://{tmp_path}/store",
    }
    with Gunicorn("app:app", "--workers", "2", cwd=tmp_path, env=env) as server:
        server.ready(60, path="/async/x")
        killed = set()
        with Load(server.url) as load:

            def answers_anew():
                answer = server.get("/async/x")
                return answer.status_code == 200 and answer.json()[1] not in killed

            for _ in range(KILLS):
                pid = server.until(
                    lambda: (a := server.get("/async/x")).status_code == 200 and a.json()[1], "up"
                )
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                server.until(answers_anew, "another process answers")
    assert len(killed) == KILLS
    assert load.problems == []
    assert set(load.counts) <= {200, 503}
    assert load.counts[200] > KILLS
    assert load.slowest < LONGEST_S
