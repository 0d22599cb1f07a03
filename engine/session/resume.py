"""Resume: the start of every training loop.

Theory of operation.  A training that may be killed begins in the same way each time: restore the newest checkpoint if
there is one, and go on after it.
"""

from __future__ import annotations

from engine.errors import NotFoundError
from engine.session.reading import Reading
from engine.state.arena import Arena


def resume(arena: Arena, eng: Reading) -> int:
    """Restore the newest checkpoint that verifies, and return its step; 0 if the directory holds none.

        for step in range(engine.resume(arena, eng) + 1, last + 1):
            train(step)
            eng.checkpoint(arena, step)

    Blocks until every byte has been read and verified.  The random generators stay as they are: see `set_rng_state`.

    Args:
        arena: filled; unchanged if there is no checkpoint.
        eng: an Engine, or a Run that `engine.open` has opened.

    Raises as `Engine.restore`, but for NotFoundError.
    """
    try:
        return eng.restore(arena).step
    except NotFoundError:
        return 0
