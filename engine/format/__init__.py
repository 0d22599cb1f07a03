"""Format: offsets and bytes.

Everything here is pure: no torch, no I/O, integers of any size, the same input always gives the same bytes.  `layout`
places tensors in files, `plan` cuts files into chunks and blocks, `manifest` records both, `checks` validates a
manifest, `values` encodes `extra`.
"""
