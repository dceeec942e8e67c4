"""Over HTTP: what hornbeam shows of itself, as apps to mount, and what its errors become."""

from hornbeam_ml.web.apps import asgi_app, wsgi_app
from hornbeam_ml.web.handlers import install_error_handlers

__all__ = ["asgi_app", "install_error_handlers", "wsgi_app"]
