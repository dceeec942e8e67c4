"""Nodes: processes whose functions and servings others call by name.

``hornbeam node ml_worker`` is a program like any other. A supervisor keeps its process running,
which imports the module, loads its models and then serves (`program`). Each worker of a gunicorn
may be a node as well (`worker_node`).
"""
