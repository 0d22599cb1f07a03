"""Io: the compiled module, typed.

`binding` imports it, `packing` makes its arrays, `job` is one save or restore, `pipeline` the native thread.  `backend`
finds out which way of moving blocks works on this host.  Nothing here knows torch.
"""
