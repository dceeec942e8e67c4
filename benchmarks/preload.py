"""Memory of a server's processes with and without HORNBEAM_PRELOAD, and how long they boot.

python benchmarks/preload.py --workers 4

Every worker loads its own SentenceTransformer (apps/embed.py, all-MiniLM-L6-v2) after the fork,
and answers the same requests. The proportional set size (PSS) of a process counts a page that n
processes share as a page / n, so that of all processes adds up to what they take together.
"""

from __future__ import annotations

import http.client
import json
import re
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from common import environment, gunicorn, note, parser, poll, report, rotated, summary

APPS = Path(__file__).parent / "apps"
WORKER = "hornbeam_ml.worker.HornbeamWorker"  # what `-k hornbeam` stands for
TEXTS = ["a cat", "the quick brown fox jumps over the lazy dog " * 10, "Grüße aus Köln"]


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--requests", type=int, default=30, help="to each worker")
    options.add_argument("--preload", default="torch,sentence_transformers", help="modules")
    options.set_defaults(rounds=3)
    args = options.parse_args()
    machine = environment("gunicorn", "torch", "sentence-transformers", "transformers")
    contenders = {"without": "", "with": args.preload}
    rounds = {name: [] for name in contenders}
    for turn in range(args.rounds):
        for name in rotated(list(contenders), turn):
            figures = measure(args, contenders[name])
            note(f"round {turn + 1}, {name}: {figures['pss_mb']:.0f} MB")
            rounds[name].append(figures)
    pss = {name: summary([one["pss_mb"] for one in rounds[name]]) for name in rounds}
    answers = [one.pop("answers") for name in rounds for one in rounds[name]]
    report(
        {
            "benchmark": "preload",
            "options": {name: value for name, value in vars(args).items() if name != "out"},
            "environment": machine,
            "pss_mb": pss,
            "ratio": round(pss["with"]["median"] / pss["without"]["median"], 3),
            "boot_s": {name: summary([one["boot_s"] for one in rounds[name]]) for name in rounds},
            "answers_identical": all(answer == answers[0] for answer in answers),
            "processes": {name: rounds[name][0]["processes"] for name in rounds},
        },
        args.out,
    )


def measure(args, modules):
    """Start a server, ask every worker the same, and look at the memory of all its processes."""
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as directory:
        began = time.monotonic()
        with gunicorn(
            "embed:app",
            APPS,
            *("--worker-class", WORKER, "--workers", str(args.workers), "--keep-alive", "120"),
            HORNBEAM_STORE=f"lmdb://{directory}/store",
            HORNBEAM_PRELOAD=modules,
        ) as (child, address):
            found = {}
            poll(lambda: len(connect(found, address)) == args.workers, "all answer", child)
            boot = time.monotonic() - began
            answers = [ask(connection, args.requests) for connection in found.values()]
            processes = [memory(pid) for pid in (child.pid, *sorted(found))]
            for connection in found.values():
                connection.close()
    return {
        "boot_s": boot,
        "pss_mb": sum(process["pss_mb"] for process in processes),
        "processes": processes,
        "answers": answers[0] if all(one == answers[0] for one in answers) else None,
    }


def connect(found, address):
    """Open one more connection, and keep it if it reached a worker that has none yet."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET", "/threads")
        pid = json.load(connection.getresponse())["pid"]
    except OSError:
        return found
    if found.setdefault(pid, connection) is not connection:
        connection.close()
    return found


def ask(connection, count):
    """Send the same requests to one worker; return its answers."""
    answers = []
    for number in range(count):
        body = json.dumps({"text": TEXTS[number % len(TEXTS)]})
        connection.request("POST", "/embed", body, {"content-type": "application/json"})
        answers.append(connection.getresponse().read())
    return answers


def memory(pid):
    """Return what a process has, in MB (1e6 bytes)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kb = {name: int(value) for name, value in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}
    names = {"pss_mb": "Pss", "anonymous_pss_mb": "Pss_Anon", "file_pss_mb": "Pss_File"}
    return {name: round(kb[field] * 1024 / 1e6, 1) for name, field in names.items()}


if __name__ == "__main__":
    main()
