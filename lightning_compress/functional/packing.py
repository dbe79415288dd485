"""Headers in fewer bytes: raw DEFLATE that starts from a dictionary of what headers usually hold.

The dictionary is part of the file format: it never changes within a major version.
"""

from __future__ import annotations

import zlib

MAX_HEADER = 64 << 20  # bytes, unpacked
_PLAIN, _DEFLATED = b"\0", b"\1"
_LEVEL, _WINDOW, _MEMORY = 9, -15, 9

# Names of layers and parameters, then sorts of tensors, shapes, streams and steps, as `headers` writes them; what is
# most usual stands last.
DICTIONARY = b"".join(
    (
        b'{"skipped":{"_metadata":"dict, not a tensor"}{"stale":{"',
        b"\x03$\0\x0dFuseBatchNorm\0\x09Factorize\0\x0eRemoveChannels\0\x0aDropLayers\0\x0dTruncateModes",
        b'{"granularity":"per_tensor","include":["*"],"exclude":["symmetric":false,"activation_bits":8,"rounding":"',
        b'compensated","calibrator":"minmax","strategy":"hash","codebook_dtype":"float16","pattern":"2:4","criterion":',
        b'"taylor","scope":"layer","lambda":0.01,"seed":1,"ratio":0.5,"rank_ratio":0.25,"clusters":16,"bits":4}',
        b"layer\x02.\x01.conv\x02.weight\0layer\x01.\x01.bn\x02.weight\0layer\x01.\x01.bn\x01.bias\0",
        b"layer\x01.\x01.bn\x01.running_mean\0layer\x01.\x01.bn\x01.running_var\0",
        b"layer\x01.\x01.bn\x01.num_batches_tracked\0layer\x01.\x01.shortcut.downsample.\x01.features.\x02.weight\0",
        b"model.encoder.decoder.blocks.embed_tokens.position_embedding.kernel\0lifting.projection.fcs.\x01.weight\0",
        b"fno_blocks.convs.\x01.weight.tensor\0fno_blocks.fno_skips.\x01.conv.weight\0",
        b"layers.\x02.self_attn.in_proj_weight\0layers.\x01.self_attn.in_proj_bias\0",
        b"layers.\x01.self_attn.out_proj.weight\0layers.\x01.self_attn.out_proj.bias\0",
        b"layers.\x01.attention.query.key.value.q_proj.k_proj.v_proj.mlp.\0layers.\x01.linear\x02.weight\0",
        b"layers.\x01.linear\x01.bias\0layers.\x01.norm\x02.weight\0layers.\x01.norm\x01.bias\0",
        b"head.weight\0head.bias\0classifier.weight\0classifier.bias\0linear.weight\0linear.bias\0",
        b"\x03.weight\0\x01.bias\0\x02.weight\0\x01.bias\0\x01.weight\0\x01.bias\0",
        b"conv\x02.weight\0bn\x02.weight\0bn\x01.bias\0bn\x01.running_mean\0bn\x01.running_var\0",
        b"bn\x01.num_batches_tracked\0conv\x02.weight\0conv\x01.bias\0conv\x02.weight\0conv\x01.bias\0",
        b"\x03\x0d\0\x05\0\x0d\x06hashed\x08bloomier\x07vectors\x0cpower_of_two\x05e_max\x12\x09minifloat\x01",
        b'{"axes":[0],"exponent":0,"mantissa":0,"size":0,"width":0}\x02\x05codes\x04\x05scale6\x0d\0',
        b'{"key":0,"mask":null,"scale":null,"seed":0,"shape":[0,0,0,0],"width":0}\x02\x05slots\x0e\x08codebook6',
        b"\x03\x05codes\x0c\x05scale6\x0azero_point\x12\x0d\0",
        b"\x01\x02\x02\x02\x02\x02\0\x01\x01\x01\x01\x01\0\0\x01\0\x01\0\x01\0\x01\0\x01",
        b"\x11 \x10\x03\x03\x05\x05\x05\x05\x05\0\x13\x03\x03\x05\x05\x05\x05\x05\0",
        b"\x11@ \x03\x03\x05\x05\x05\x05\x05\0",
        b"\x08\x80\x02\x80\x04\x05\x0a\x80\x01\x05\x0a@\x05\x0a\x0a\x05",
        b"\0\0\x02\0\0\x02\0\0\x02\0\0\x07\0\0\x07\0\0\x07",
        b"\x01\x02\0\0\0\0\x01\x02\0\0\0\x01\x01\x01\x01\x02",
        b"lconv\x02.weight\0conv\x01.bias\0conv\x02.weight\0conv\x01.bias\0",
        b"fc\x02.weight\0fc\x01.bias\0fc\x02.weight\0fc\x01.bias\0fc\x02.weight\0fc\x01.bias\0",
        b'\x02\x0d\x06affine\x01@{"axes":[],"qmax":0,"qmin":0,"size":0,"width":0,"zero_point":null}',
        b"\x02\x05codes\x0c\x05scale6",
        b'\x02\x0d\x06affine\x01B{"axes":[0],"qmax":0,"qmin":0,"size":0,"width":0,"zero_point":null}',
        b"\x02\x05codes\x08\x05scale6\x0d\0\x02\x0d\x04mask\x01\x02{}\x02\x04mask\0\x06values6\x0d\0",
        b'\x02\x0d\x08codebook\x01\x1b{"scale":null,"zero":false}\x02\x05codes\x04\x08codebook6\x0d\0',
        b'\x01\x0d\x08codebook\x01\x1b{"scale":null,"zero":false}\x02\x05codes\x04\x08codebook.',
        b"\x10\x06\x01\x05\x05\x05\x12\x10\x05\x05\x05\x08x\x90\x03\x05\x0aT\x05\x0a\x0a\x05",
        b"\x02\0\x02\0\x02\0\x02\0\x02\0\x09\x04\x09\x05\x09\x04\x09\x05\x09\x04\0\0\x02\0\0\x02\0\0\x07\x02x\x07\x06\x07.\0<",
        b'\x03#\0\x16RateDistortionQuantize\x0c{"bits":2.5}\0\x08Quantize\x0a{"bits":4}\0\0\0\0',
        b'\x03H\0\x05Prune\x10{"sparsity":0.9}\0\0\xb0\x07\x02\xaa\x02\0\x0cShareWeights\x0f{"clusters":16}\0\0\0\0',
        b'\x03\x9c\x01\0\x0cShareWeights\x85\x01{"clusters":{"*":8,"*.bias":4},"codebook_dtype":"float16","include":',
        b'["*","conv1.bias","conv2.bias","fc1.bias","fc2.bias","fc3.bias"]}\0\0\0\0',
    )
)


def pack(data: bytes) -> bytes:
    """A header in as few bytes as possible.

    Args:
        data: at most ``MAX_HEADER`` bytes.

    Returns:
        One byte, 0 or 1, and the data as they are or deflated, whichever is shorter.

    Raises:
        ValueError: it is longer.

    Examples:
        >>> len(pack(b"conv1.weight.running_mean"))
        10
    """
    if len(data) > MAX_HEADER:
        raise ValueError(f"a header of {len(data)} bytes; allowed are {MAX_HEADER}")
    coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW, _MEMORY, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return min(_PLAIN + data, _DEFLATED + coder.compress(data) + coder.flush(), key=len)


def unpack(data: bytes) -> bytes:
    """Inverse of ``pack``.

    Args:
        data: untrusted.

    Returns:
        The header.

    Raises:
        ValueError: the bytes are nothing that ``pack`` returns, or more than ``MAX_HEADER`` come out of them.

    Examples:
        >>> unpack(pack(b"abc" * 99)) == b"abc" * 99
        True
    """
    way, body = data[:1], data[1:]
    if way == _PLAIN and len(body) <= MAX_HEADER:
        return body
    if way != _DEFLATED:
        raise ValueError(f"the header begins with {way!r} and has {len(data)} bytes: it cannot be unpacked")
    coder = zlib.decompressobj(_WINDOW, DICTIONARY)
    try:
        found = coder.decompress(body, MAX_HEADER + 1)
    except zlib.error as error:
        raise ValueError(f"the header does not inflate: {error}") from None
    if len(found) > MAX_HEADER or not coder.eof or coder.unused_data:
        raise ValueError("the header does not inflate to its end, or to more than is allowed")
    return found
