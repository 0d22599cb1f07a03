"""XXH3-64 as its specification has it, slowly: the oracle that block checksums are held against.

Theory of operation.  Written from xxHash's specification (`doc/xxhash_spec.md`, "XXH3 Algorithm Overview"), of which it
has the two cases that block checksums need in tests: 17 to 32 bytes, as a block's place is 24, and more than 240, as
blocks are.  It shares no line with what the engine is built from, and `test_native` holds it against xxHash's own
published vectors.
"""

from __future__ import annotations

import struct

_MASK = (1 << 64) - 1
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_PRIME_MX1 = 0x165667919E3779F9

# "Default Secret" of the specification.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_STRIPE_BYTES = 64
_BLOCK_STRIPES = (len(_SECRET) - _STRIPE_BYTES) // 8


def xxh3_64(data: bytes, seed: int) -> int:
    """The hash of 17 to 32 bytes, or of more than 240."""
    if len(data) > 240:
        return _long(data, seed)
    assert 16 < len(data) <= 32, len(data)
    mixed = _mix16(data[:16], 0, seed) + _mix16(data[-16:], 16, seed)
    return _avalanche(len(data) * _PRIME64[0] + mixed)


def _word(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<Q", data, offset)[0])


def _fold(left: int, right: int) -> int:
    product = left * right
    return (product & _MASK) ^ (product >> 64)


def _avalanche(hashed: int) -> int:
    hashed &= _MASK
    hashed ^= hashed >> 37
    hashed = hashed * _PRIME_MX1 & _MASK
    return hashed ^ (hashed >> 32)


def _mix16(data: bytes, secret_offset: int, seed: int) -> int:
    low = _word(data, 0) ^ (_word(_SECRET, secret_offset) + seed & _MASK)
    high = _word(data, 8) ^ (_word(_SECRET, secret_offset + 8) - seed & _MASK)
    return _fold(low, high)


def _seeded_secret(seed: int) -> bytes:
    words = struct.unpack("<24Q", _SECRET)
    return struct.pack("<24Q", *((word + (-seed if index % 2 else seed)) & _MASK for index, word in enumerate(words)))


def _accumulate(lanes: list[int], stripe: bytes, secret: bytes) -> None:
    for index, (value, key) in enumerate(zip(struct.unpack("<8Q", stripe), struct.unpack("<8Q", secret), strict=True)):
        keyed = value ^ key
        lanes[index ^ 1] = (lanes[index ^ 1] + value) & _MASK
        lanes[index] = (lanes[index] + (keyed & 0xFFFFFFFF) * (keyed >> 32)) & _MASK


def _scramble(lanes: list[int], secret: bytes) -> None:
    for index, key in enumerate(struct.unpack("<8Q", secret)):
        lanes[index] = (lanes[index] ^ lanes[index] >> 47 ^ key) * _PRIME32[0] & _MASK


def _long(data: bytes, seed: int) -> int:
    secret = _seeded_secret(seed)
    lanes = [_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0]]
    for stripe in range((len(data) - 1) // _STRIPE_BYTES):
        start, key = stripe * _STRIPE_BYTES, stripe % _BLOCK_STRIPES * 8
        _accumulate(lanes, data[start : start + _STRIPE_BYTES], secret[key : key + _STRIPE_BYTES])
        if stripe % _BLOCK_STRIPES == _BLOCK_STRIPES - 1:
            _scramble(lanes, secret[-_STRIPE_BYTES:])
    _accumulate(lanes, data[-_STRIPE_BYTES:], secret[-_STRIPE_BYTES - 7 : -7])
    merged = len(data) * _PRIME64[0]
    for index in range(4):
        key = 11 + 16 * index
        merged += _fold(lanes[2 * index] ^ _word(secret, key), lanes[2 * index + 1] ^ _word(secret, key + 8))
    return _avalanche(merged)
