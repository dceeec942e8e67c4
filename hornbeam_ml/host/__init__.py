"""The model host: the servings of a module in processes of their own, for all workers.

``hornbeam host app.models`` is a program like any other. A supervisor (`supervisor`) keeps its
processes running; each imports the module, loads its servings and answers calls (`program`) over a
unix socket in a directory (`directory`) that clients know. Under gunicorn the arbiter starts one
for each configuration (`launch`).
"""
