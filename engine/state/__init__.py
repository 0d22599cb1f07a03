"""State: the tensors of a training.

`inventory` finds and names them, `arena` holds them in one buffer, `watch` notices when one has moved.
"""
