"""Serving HTTP inside a worker: from a connection to the app, for ASGI apps through uvicorn."""
