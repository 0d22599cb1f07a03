"""For any tensors, the stock safetensors library reads the file of our layout, and each tensor's bytes are where the
manifest says.

The engine reads no safetensors header, so this checks its writing.  Every input is choices for hypothesis, which make a
table of tensors, names of any kind included.  Names that cannot be stored are refused with ArenaError.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from strategies import NAMES, SMALL_SHAPES, specs

from engine.errors import ArenaError
from engine.format.layout import DTYPES, Layout, TensorSpec, lay_out
from engine.format.manifest import segment_records
from fuzz.choices import fuzz_one_input

ANY_NAMES = st.text(max_size=12) | st.sampled_from(["__metadata__", "\ud800", "\0", '"', "\\", "\u2028", "a/../b"])
# A prime, so that no two locations of a file within a page have the same bytes.
PATTERN_BYTES = 251


def one_input(data: bytes) -> None:
    """Hold the invariant for one input."""
    fuzz_one_input(laid_out, data)


@given(
    specs(SMALL_SHAPES) | specs(SMALL_SHAPES, max_count=2, names=ANY_NAMES),
    st.just({}) | st.dictionaries(NAMES, NAMES, max_size=2) | st.dictionaries(ANY_NAMES, ANY_NAMES, max_size=2),
)
def laid_out(tensors: list[TensorSpec], aliases: dict[str, str]) -> None:
    """The invariant, for a table of tensors."""
    try:
        layout = lay_out(tensors, aliases)
    except ArenaError:
        assert not all(map(is_storable, [*(spec.name for spec in tensors), *aliases]))
        return
    check(layout)


def is_storable(name: str) -> bool:
    """Whether a tensor may be called so."""
    return not any("\ud800" <= character <= "\udfff" for character in name) and name != "__metadata__"


def check(layout: Layout) -> None:
    """The invariant, for a layout."""
    records = segment_records(layout)
    seen = 0
    for index, file in enumerate(layout.files):
        data = bytes(at % PATTERN_BYTES for at in range(file.nbytes - len(file.header)))
        content = file.header + data
        stored = dict(deserialize(content))
        for record in (record for record in records if record.file == index):
            found = stored.pop(record.name)
            assert bytes(found["data"]) == content[record.offset : record.offset + record.nbytes]
            dtype = DTYPES[record.dtype]
            assert found["shape"] == dtype.header_shape(record.shape) and found["dtype"] == dtype.code
            seen += 1
        assert not stored, "the header names what the manifest does not"
    assert seen == len(records)
