"""What apps without a framework need for ASGI; test files that write an app import it there."""


async def live(receive, send):
    """Say to the server that the app has started, and in the end that it has stopped."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def respond(send, body, status=200):
    """Send a whole response."""
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
