"""State: the tensors of a training.

`inventory` finds and names them, `memory` has the pages and the geometry, `arena` holds the tensors in one buffer,
`fence` holds their writers back, `optimizers` knows torch's optimizers, `watch` notices changes before every save.
"""
