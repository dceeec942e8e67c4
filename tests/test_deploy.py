"""docs/deploy.md: its files run as far as they can here, and agree with each other."""

import configparser
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import gunicorn.config
import httpx
import pytest
import yaml
from gunicorn_process import DECIDING, HELPERS, ROOT, WORKER, Gunicorn, poll

DOCUMENT = (ROOT / "docs" / "deploy.md").read_text()


def block(language, within):
    """Return the one block of a language that holds some text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    [found] = [text for text in blocks if within in text]
    return found


def ini(text):
    """Parse a unit, in which an option may come several times."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str
    parser.read_string(text)
    return parser


CONF = block("python", "# gunicorn.conf.py")
UNIT_TEXT = block("ini", "[Service]")
UNIT = ini(UNIT_TEXT)["Service"]
DEPLOYMENT = yaml.safe_load(block("yaml", "kind: Deployment"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
NGINX = block("nginx", "upstream")
DOCKERFILE = block("dockerfile", "FROM")
APP = """
import os
from bare_asgi import live, respond
from hornbeam_ml import Serving

serving = Serving(lambda: list, name="sorts")

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    await respond(send, b"hello")
"""


@pytest.fixture(scope="module")
def settings():
    """What the configuration file says, without anything in the environment."""
    names = {}
    exec(CONF, {**names, "__name__": "conf"}, names)
    return names


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("deploy")
    (made / "app.py").write_text(APP)
    (made / "gunicorn.conf.py").write_text(CONF)
    return made


@pytest.fixture(scope="module")
def server(directory):
    """A server with the configuration file and the pages that the manifests ask for."""
    path = re.search(r"^Environment=(HORNBEAM_ADMIN_PATH)=(\S+)$", UNIT_TEXT, re.MULTILINE)
    env = {path[1]: path[2], "HORNBEAM_ADMIN_TOKEN": "s3cret", "WEB_CONCURRENCY": "2"}
    with Gunicorn("app:app", cwd=directory, env=env) as started:
        started.until(lambda: started.log.count("Ready: ") == 2, "both workers are ready")
        yield started


# What can be run


def test_a_server_starts_with_the_configuration(server):
    assert server.get("/").text == "hello"
    assert len(server.workers()) == 2
    assert not re.search(r"WARNING|does nothing", server.log, re.IGNORECASE), server.log


def test_probes_are_answered_where_the_manifests_look(server):
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        answer = server.get(CONTAINER[probe]["httpGet"]["path"])
        assert answer.status_code == 200, probe


def test_the_command_for_figures_is_right(server):
    """All but probes need the token."""
    path = re.search(r"localhost:8000(/\S+/stats)$", DOCUMENT, re.MULTILINE)[1]
    assert server.get(path).status_code == 401
    headers = {"Authorization": "Bearer s3cret"}
    assert httpx.get(server.url + path, headers=headers).json()["worker"]["phase"] == "serving"


def test_the_socket_and_the_notification_of_systemd(directory, tmp_path):
    """gunicorn listens on what it is given, says that it is ready, and ends with SIGTERM."""
    starter = textwrap.dedent("""
        import os, sys
        os.dup2(int(sys.argv[1]), 3)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "-k", sys.argv[2], "app:app"])
        """)
    inherited = {name: value for name, value in os.environ.items() if not DECIDING.match(name)}
    log = tmp_path / "log"
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
        log.open("w") as output,
    ):
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-c", starter, str(listening.fileno()), WORKER],
            cwd=directory,
            env={
                **inherited,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]),
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
            },
            pass_fds=[listening.fileno()],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            assert notified.recv(1000).startswith(b"READY=1")
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            assert httpx.get(url, timeout=20).text == "hello"  # waits in the kernel until then
            poll(lambda: log.read_text().count("Ready: ") == 2, "both workers are ready")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


# What has to agree


def seconds(text):
    return int(re.fullmatch(r"(\d+)s?", text)[1])


def test_supervisors_wait_longer_than_the_server(settings):
    """Else requests in flight are cut off by SIGKILL."""
    graceful = settings["graceful_timeout"]
    assert seconds(UNIT["TimeoutStopSec"]) > graceful
    assert int(re.search(r"docker stop --time (\d+)", DOCUMENT)[1]) > graceful
    [command, pause] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert POD["terminationGracePeriodSeconds"] > int(pause) + graceful


def test_the_proxy_closes_idle_connections_first(settings):
    idle = re.search(r"^ +keepalive_timeout (\S+);", NGINX, re.MULTILINE)[1]
    assert seconds(idle) < settings["keepalive"]


def test_the_unit_signals_as_gunicorn_expects():
    assert UNIT["Type"] == "notify"
    assert UNIT["KillMode"] == "mixed"
    assert UNIT["ExecReload"].endswith("-HUP $MAINPID")


def test_containers_run_gunicorn_itself_as_nobody_in_particular():
    """A shell as process 1 would swallow SIGTERM."""
    assert re.search(r'^CMD \["gunicorn", ', DOCKERFILE, re.MULTILINE)
    assert re.search(r"^USER (?!root)", DOCKERFILE, re.MULTILINE)
    assert POD["securityContext"]["runAsNonRoot"]


def test_the_configuration_names_settings_that_there_are(settings):
    known = gunicorn.config.make_settings()
    assert settings["worker_class"] == "hornbeam"
    named = {name for name, value in settings.items() if not isinstance(value, type(os))}
    assert named <= set(known)
    table = DOCUMENT.split("## What each setting of gunicorn does")[1]
    in_table = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert set(in_table) - {"WEB_CONCURRENCY"} <= set(known)
    assert named - {"worker_class", "control_socket_disable"} <= set(in_table)


def test_every_variable_that_is_read_is_in_the_table():
    sources = "".join(
        path.read_text()
        for name in ("ml", "state")
        for path in Path(ROOT / f"hornbeam_{name}").rglob("*.py")
    )
    table = DOCUMENT.split("## What each variable does")[1].split("\n## ")[0]
    read = set(re.findall(r"\bHORNBEAM_[A-Z_]+\b", sources))
    assert read <= set(re.findall(r"^\| `(HORNBEAM_[A-Z_]+)`", table, re.MULTILINE))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENT):
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / "docs" / file).exists(), target
        titles = re.findall(r"^#+ (.*)$", DOCUMENT, re.MULTILINE)
        slugs = {title.lower().replace(" ", "-").replace(".", "") for title in titles}
        assert not anchor or anchor in slugs, target
