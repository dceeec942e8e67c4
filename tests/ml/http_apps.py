"""Apps for the tests of HTTP: the same paths as ASGI and as WSGI. Imported by the servers."""

from __future__ import annotations

import asyncio
import json

PIECE = b"x" * 65_536
FLOOD = 600  # pieces: far more than buffers hold
state = {"flooded": 0, "left": 0, "paths": [], "background": "never"}
go = asyncio.Event()


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
    elif scope["type"] == "websocket":
        await websocket(scope, receive, send)
    else:
        state["paths"].append(scope["path"])
        await HTTP.get(scope["path"].rpartition("/")[2], echo)(scope, receive, send)


async def lifespan(scope, receive, send):
    scope["state"]["list"] = ["of the lifespan"]
    scope["state"]["text"] = "of the lifespan"
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def read(receive):
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            state["left"] += 1
            return None
        body += message["body"]
        if not message["more_body"]:
            return body


async def answer(send, content, status=200, headers=()):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [(b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope, receive, send):
    body = await read(receive)
    if body is not None:
        scope["state"]["list"].append("of a request")
        seen = {
            "method": scope["method"],
            "path": scope["path"],
            "raw_path": scope["raw_path"].decode("latin-1"),
            "query": scope["query_string"].decode("latin-1"),
            "root_path": scope["root_path"],
            "version": scope["http_version"],
            "scheme": scope["scheme"],
            "client": scope["client"],
            "headers": [[n.decode("latin-1"), v.decode("latin-1")] for n, v in scope["headers"]],
            "body": body.decode("latin-1"),
            "text": scope["state"].get("text"),
            "state": scope["state"]["list"],
        }
        scope["state"]["text"] = "of a request"
        await answer(send, seen)


async def unread(scope, receive, send):
    await answer(send, b"unread")


async def tell(scope, receive, send):
    await answer(send, state)


async def release(scope, receive, send):
    go.set()
    await answer(send, b"")


async def hold(scope, receive, send):
    """Leave the body where it is until told otherwise."""
    go.clear()
    state["paths"].append("held")
    await go.wait()
    await count(scope, receive, send)


async def count(scope, receive, send):
    total = largest = 0
    while True:
        message = await receive()
        total += len(message.get("body", b""))
        largest = max(largest, len(message.get("body", b"")))
        if not message.get("more_body"):
            break
    await answer(send, [total, largest])


async def stream(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in (b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


async def flood(scope, receive, send):
    state["flooded"] = 0
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(FLOOD):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        state["flooded"] += 1
    await send({"type": "http.response.body"})


async def no_content(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def not_modified(scope, receive, send):
    await send({"type": "http.response.start", "status": 304, "headers": []})
    await send({"type": "http.response.body"})


async def fail(scope, receive, send):
    raise ValueError("before the start")


async def fail_late(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    raise ValueError("after the start")


async def nothing(scope, receive, send):
    pass


async def half(scope, receive, send):
    headers = [(b"content-length", b"10")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})


async def split(scope, receive, send):
    await answer(send, b"", headers=[(b"x-split", b"a\r\nset-cookie: b")])


async def cookies(scope, receive, send):
    await answer(send, b"", headers=[(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])


HTTP = {
    "unread": unread,
    "state": tell,
    "go": release,
    "hold": hold,
    "count": count,
    "stream": stream,
    "flood": flood,
    "no-content": no_content,
    "not-modified": not_modified,
    "fail": fail,
    "fail-late": fail_late,
    "nothing": nothing,
    "half": half,
    "split": split,
    "cookies": cookies,
}


async def websocket(scope, receive, send):
    path = scope["path"].removeprefix("/mounted")
    assert (await receive())["type"] == "websocket.connect"
    if path == "/reject":
        await send({"type": "websocket.close"})
        return
    if path == "/deny":
        headers = [(b"content-length", b"2")]
        start = {"type": "websocket.http.response.start", "status": 401, "headers": headers}
        await send(start)
        await send({"type": "websocket.http.response.body", "body": b"no"})
        return
    if path == "/fail":
        raise ValueError("before the handshake")
    protocols = scope["subprotocols"]
    await send({"type": "websocket.accept", "subprotocol": protocols[-1] if protocols else None})
    if path == "/close":
        await send({"type": "websocket.close", "code": 4001, "reason": "enough"})
        return
    if path == "/scope":
        content = [scope["scheme"], scope["client"], scope["state"]["text"], scope["root_path"]]
        await send({"type": "websocket.send", "text": json.dumps(content)})
    while (message := await receive())["type"] == "websocket.receive":
        content = {key: message[key] for key in ("text", "bytes") if message.get(key) is not None}
        await send({"type": "websocket.send", **content})
    state["left"] = message["code"]


def wsgi(environ, start_response):
    path = environ["PATH_INFO"]
    state["paths"].append(path)
    return WSGI.get(path.rpartition("/")[2], wsgi_echo)(environ, start_response)


def wsgi_answer(start_response, content, headers=()):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    start_response("200 OK", [("Content-Length", str(len(body))), *headers])
    return [body]


def wsgi_echo(environ, start_response):
    seen = {
        "method": environ["REQUEST_METHOD"],
        "path": environ["PATH_INFO"].encode("latin-1").decode(errors="replace"),
        "query": environ["QUERY_STRING"],
        "version": environ["SERVER_PROTOCOL"].removeprefix("HTTP/"),
        "scheme": environ["wsgi.url_scheme"],
        "client": [environ["REMOTE_ADDR"], environ.get("REMOTE_PORT")],
        "headers": [
            [k[5:].replace("_", "-").lower(), v]
            for k, v in environ.items()
            if k.startswith("HTTP_")
        ],
        "body": environ["wsgi.input"].read().decode("latin-1"),
    }
    return wsgi_answer(start_response, seen)


def wsgi_stream(environ, start_response):
    start_response("200 OK", [])
    return iter([b"one", b"", b"two"])


def wsgi_status(status):
    def app(environ, start_response):
        start_response(status, [])
        return []

    return app


def wsgi_fail(environ, start_response):
    raise ValueError("before the start")


def wsgi_fail_late(environ, start_response):
    start_response("200 OK", [])
    yield b"begun"
    raise ValueError("after the start")


WSGI = {
    "state": lambda _, start: wsgi_answer(start, state),
    "unread": lambda _, start: wsgi_answer(start, b"unread"),
    "count": lambda environ, start: wsgi_answer(start, [len(environ["wsgi.input"].read()), 0]),
    "stream": wsgi_stream,
    "no-content": wsgi_status("204 No Content"),
    "not-modified": wsgi_status("304 Not Modified"),
    "fail": wsgi_fail,
    "fail-late": wsgi_fail_late,
    "split": lambda _, start: wsgi_answer(start, b"", [("X-Split", "a\r\nSet-Cookie: b")]),
    "cookies": lambda _, start: wsgi_answer(
        start, b"", [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
    ),
}
