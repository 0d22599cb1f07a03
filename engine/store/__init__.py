"""Store: one directory of checkpoints, without torch.

`filesystem` is the seam to the kernel, `catalog` moves directories, `commit` makes a save durable and visible, `writer`
and `reader` run saves and restores through a pipeline.
"""
