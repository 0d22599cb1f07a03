"""Monitor: a process that owns a directory of checkpoints, and outlives the trainer.

Theory of operation.  `client` is the trainer's end and starts the process, `server` is the process, `protocol` is what
they say to each other, `shared_memory` what they share, and `status` asks a live monitor from any process.
"""
