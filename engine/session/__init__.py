"""Session: one training that uses one store.

`in_flight` counts saves and orders their steps; the commit threads are in `workers`.
"""
