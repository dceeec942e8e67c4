"""What hornbeam shows of itself over HTTP, as one ASGI and one WSGI app to mount."""

from hornbeam_ml.web.apps import asgi_app, wsgi_app

__all__ = ["asgi_app", "wsgi_app"]
