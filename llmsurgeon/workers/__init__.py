"""Processes that run a model in an engine, asked from outside: a line of JSON in, a line out.

`answering` is what they share. `openvino_worker` and `vllm_worker` are run as files by the Python of an environment in
which that engine is installed and llmsurgeon need not be: they import nothing of it but each other.
"""
