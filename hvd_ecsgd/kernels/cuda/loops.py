"""The loops, in Triton: one program for each tile of a table (`tables.Tiles`). Only `cuda.triton` imports this, as Triton need not be there.

Roundings are those of the reference: no product and sum are fused but by `tl.fma` (every launch says enable_fp_fusion=False), float32 is divided by
`tl.div_rn`, and sums are taken in float64, in an order that places alone decide.
"""

import triton
import triton.language as tl

# Columns of a table of tiles; jitted functions see globals only as constants.
_COLUMNS = tl.constexpr(7)
_START, _COUNT, _BEGIN, _SEGMENT, _ROW, _BYTE, _ELEMENT = (tl.constexpr(i) for i in range(7))
_BINS = tl.constexpr(2048)


@triton.jit
def tell(out):
    """out ← 1: whether kernels can be launched at all."""
    tl.store(out, 1)


@triton.jit
def _of(tiles, at, column):
    return tl.load(tiles + at * _COLUMNS + column)


@triton.jit
def _of_tile(tiles, column):
    return _of(tiles, tl.program_id(0).to(tl.int64), column)


@triton.jit
def _divided(x, y):
    if x.dtype == tl.float32:
        result = tl.div_rn(x, y)
    else:
        result = x / y
    return result


@triton.jit
def _bits(v):
    """The bits of a float as an integer."""
    if v.dtype == tl.float32:
        result = v.to(tl.int32, bitcast=True)
    else:
        result = v.to(tl.int64, bitcast=True)
    return result


@triton.jit
def _key(v):
    """The magnitude as int64 of the same order; NaN counts as inf."""
    if v.dtype == tl.float32:
        result = tl.minimum(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000).to(tl.int64)
    else:
        result = tl.minimum(v.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)
    return result


@triton.jit
def _places(B: tl.constexpr, P: tl.constexpr):
    """0 … B − 1 in rows of P."""
    return tl.arange(0, B // P)[:, None] * P + tl.arange(0, P)[None, :]


@triton.jit
def _philox32(counter, key):
    """Four words (uint32) of Philox4x32-10 for each int64 of `counter`, of an int64 key."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = c0 ^ c0
    c3 = c0 ^ c0
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _draws32(begin, key, B: tl.constexpr):
    """32 random bits for each of the B elements from `begin` on, a multiple of 4."""
    w0, w1, w2, w3 = _philox32(begin // 4 + tl.arange(0, B // 4), key)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _draws64(begin, key, B: tl.constexpr):
    """64 random bits for each, low word first."""
    w0, w1, w2, w3 = _philox32(begin // 2 + tl.arange(0, B // 2), key)
    first = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    second = w2.to(tl.uint64) | (w3.to(tl.uint64) << 32)
    return tl.interleave(first, second)


@triton.jit
def _high(a, b):
    """The upper half of the product of two uint64."""
    a0, a1 = a & 0xFFFFFFFF, a >> 32
    b0, b1 = b & 0xFFFFFFFF, b >> 32
    middle = a1 * b0 + ((a0 * b0) >> 32)
    low = a0 * b1 + (middle & 0xFFFFFFFF)
    return a1 * b1 + (middle >> 32) + (low >> 32)


@triton.jit
def _below(i, key, n):
    """The i-th integers (int64) below n < 2³² of NumPy's Philox4x64-10 with an int64 key."""
    zero = (i - i).to(tl.uint64)
    c0 = (i // 4 + 1).to(tl.uint64)
    c1, c2, c3 = zero, zero, zero
    k0 = zero + key.to(tl.uint64)
    k1 = zero
    m0 = zero + 0xD2E7470EE14C6C93
    m1 = zero + 0xCA5A826395121157
    for _ in tl.static_range(10):
        high0, high1 = _high(m0, c0), _high(m1, c2)
        low0, low1 = m0 * c0, m1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B97F4A7C15
        k1 = k1 + 0xBB67AE8584CAA73B
    lane = i % 4
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    many = zero + n.to(tl.uint64)
    return (((word >> 32) * many + (((word & 0xFFFFFFFF) * many) >> 32)) >> 32).to(tl.int64)


@triton.jit
def _put(out, value, alpha, mask, ADD: tl.constexpr):
    """out += alpha·value in one rounding, or that of adding to zero."""
    factor = tl.load(alpha).to(value.dtype)
    if ADD:
        old = tl.load(out, mask=mask, other=0.0)
    else:
        old = tl.zeros(value.shape, value.dtype)
    tl.store(out, tl.fma(value, tl.broadcast_to(factor, value.shape), old), mask=mask)


# -- sums: NORM is 0 for Σ|v|, 1 for Σv², 2 for the largest magnitude ------------------------------------------------------------------------


@triton.jit
def sums(buffer, tiles, partial, counts, NORM: tl.constexpr, COUNT: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(buffer + _of_tile(tiles, _START) + i, mask=i < _of_tile(tiles, _COUNT), other=0.0)
    if NORM == 2:
        largest = tl.max(_bits(v) & _magnitude_mask(v), 0)  # of a NaN larger than of an inf
        total = largest.to(v.dtype, bitcast=True).to(tl.float64)
    else:
        wide = v.to(tl.float64)
        if NORM == 1:
            total = tl.sum(wide * wide, 0)
        else:
            total = tl.sum(tl.abs(wide), 0)
    at = tl.program_id(0)
    tl.store(partial + at, total)
    if COUNT:
        tl.store(counts + at, tl.sum((v != 0.0).to(tl.int32), 0))


@triton.jit
def _magnitude_mask(v):
    if v.dtype == tl.float32:
        result = 0x7FFFFFFF
    else:
        result = 0x7FFFFFFFFFFFFFFF
    return result


@triton.jit
def scales(partial, counts, rows, out, NORM: tl.constexpr, DIVIDE: tl.constexpr, COUNT: tl.constexpr, B: tl.constexpr):
    """Of a row (first tile, tiles, elements): its norm; with DIVIDE over √n, or n where NORM is 0. n counts elements, with COUNT those not zero."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(rows + 3 * row)
    many = tl.load(rows + 3 * row + 1)
    n = tl.load(rows + 3 * row + 2)
    i = tl.arange(0, B)
    total = tl.zeros((B,), tl.float64)
    nonzero = tl.zeros((B,), tl.int64)
    for at in range(0, many, B):
        mask = at + i < many
        part = tl.load(partial + first + at + i, mask=mask, other=0.0)
        if NORM == 2:
            largest = tl.maximum(total.to(tl.int64, bitcast=True), part.to(tl.int64, bitcast=True))
            total = largest.to(tl.float64, bitcast=True)
        else:
            total += part
        if COUNT:
            nonzero += tl.load(counts + first + at + i, mask=mask, other=0)
    if NORM == 2:
        norm = tl.max(total.to(tl.int64, bitcast=True), 0).to(tl.float64, bitcast=True)
    else:
        norm = tl.sum(total, 0)
    if NORM == 1:
        norm = tl.sqrt(norm)
    norm = norm.to(out.dtype.element_ty)
    if DIVIDE:
        if COUNT:
            n = tl.sum(nonzero, 0)
        n = tl.maximum(n, 1).to(tl.float64)
        if NORM == 1:
            n = tl.sqrt(n)
        norm = (norm.to(tl.float64) / n).to(out.dtype.element_ty)
    tl.store(out + row, norm)


@triton.jit
def short_rows(buffer, rows, out, many, NORM: tl.constexpr, DIVIDE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """As `sums` and `scales`, of ROWS rows (start, elements) of up to WIDE elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < many
    numel = tl.load(rows + 2 * row + 1, mask=there, other=0)
    i = tl.arange(0, WIDE)[None, :]
    v = tl.load(buffer + tl.load(rows + 2 * row, mask=there, other=0)[:, None] + i, mask=i < numel[:, None], other=0.0)
    if NORM == 2:
        norm = tl.max(_bits(v) & _magnitude_mask(v), 1).to(v.dtype, bitcast=True)
    else:
        wide = v.to(tl.float64)
        if NORM == 1:
            norm = tl.sqrt(tl.sum(wide * wide, 1)).to(v.dtype)
        else:
            norm = tl.sum(tl.abs(wide), 1).to(v.dtype)
    if DIVIDE:
        n = tl.maximum(numel, 1).to(tl.float64)
        if NORM == 1:
            n = tl.sqrt(n)
        norm = (norm.to(tl.float64) / n).to(v.dtype)
    tl.store(out + row, norm, mask=there)


@triton.jit
def _scale(of, tiles, i, mask, WIDTH: tl.constexpr):
    """The scale of each element of a tile: its segment's (WIDTH 0), or its row's."""
    row = _of_tile(tiles, _ROW)
    if WIDTH == 0:
        result = tl.load(of + row + (i - i))
    else:
        begin = _of_tile(tiles, _BEGIN)
        result = tl.load(of + row + begin // WIDTH + ((begin % WIDTH).to(tl.int32) + i) // WIDTH, mask=mask, other=0.0)
    return result


@triton.jit
def _pack(codes, place, count, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Store int32 codes in rows of P = 8/BITS, a byte each."""
    at = tl.arange(0, B // P)
    packed = tl.sum(codes << (tl.arange(0, P) * BITS)[None, :], axis=1)
    tl.store(place + at, packed.to(tl.uint8), mask=at < (count + P - 1) // P)


@triton.jit
def _unpack(place, count, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    at = tl.arange(0, B // P)
    packed = tl.load(place + at, mask=at < (count + P - 1) // P, other=0).to(tl.int32)
    return (packed[:, None] >> (tl.arange(0, P) * BITS)[None, :]) & ((1 << BITS) - 1)


# -- sign and ternary -----------------------------------------------------------------------------------------------------------------------------


@triton.jit
def sign_extract(buffer, tiles, of, codes, WIDTH: tl.constexpr, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, 8)
    mask = i < count
    place = buffer + _of_tile(tiles, _START) + i
    v = tl.load(place, mask=mask, other=0.0)
    s = _scale(of, tiles, i, mask, WIDTH)
    s = tl.where(s - s == 0.0, s, 0.0)  # what has no finite scale stays whole
    _pack((v < 0.0).to(tl.int32), codes + _of_tile(tiles, _BYTE), count, 1, 8, B)
    tl.store(place, v - tl.where(v < 0.0, -s, s), mask=mask)


@triton.jit
def sign_decode(out, tiles, of, codes, alpha, WIDTH: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, 8)
    mask = i < count
    s = _scale(of, tiles, i, mask, WIDTH)
    negative = _unpack(codes + _of_tile(tiles, _BYTE), count, 1, 8, B) != 0
    _put(out + _of_tile(tiles, _START) + i, tl.where(negative, -s, s), alpha, mask, ADD)


@triton.jit
def ternary_extract(buffer, tiles, of, codes, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, 4)
    mask = i < count
    place = buffer + _of_tile(tiles, _START) + i
    v = tl.load(place, mask=mask, other=0.0)
    s = _scale(of, tiles, i, mask, 0)
    s = tl.where(s - s == 0.0, s, 0.0)
    _pack((v > 0.0).to(tl.int32) + 2 * (v < 0.0).to(tl.int32), codes + _of_tile(tiles, _BYTE), count, 2, 4, B)
    tl.store(place, v - tl.where(v < 0.0, -s, tl.where(v > 0.0, s, 0.0)), mask=mask)


@triton.jit
def ternary_decode(out, tiles, of, codes, alpha, ADD: tl.constexpr, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, 4)
    mask = i < count
    s = _scale(of, tiles, i, mask, 0)
    code = _unpack(codes + _of_tile(tiles, _BYTE), count, 2, 4, B)
    value = tl.where(code == 1, s, tl.where(code == 2, -s, 0.0 * s))  # a NaN scale times a zero is NaN
    _put(out + _of_tile(tiles, _START) + i, value, alpha, mask, ADD)


# -- QSGD and natural -----------------------------------------------------------------------------------------------------------------------------


@triton.jit
def qsgd_extract(buffer, tiles, of, codes, keys, LEVELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, P)
    mask = i < count
    place = buffer + _of_tile(tiles, _START) + i
    v = tl.load(place, mask=mask, other=0.0)
    norm = _scale(of, tiles, i, mask, WIDTH)
    key = tl.load(keys + _of_tile(tiles, _SEGMENT))
    if v.dtype == tl.float32:
        uniform = (_draws32(_of_tile(tiles, _BEGIN), key, B) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
    else:
        uniform = (_draws64(_of_tile(tiles, _BEGIN), key, B) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16
    ratio = _divided(tl.abs(v), tl.where(norm > 0.0, norm, 1.0))
    x = tl.reshape(uniform, (B // P, P)) + ratio * LEVELS
    x = tl.where(ratio == ratio, tl.where(x < LEVELS, x, LEVELS), 0.0)
    level = x.to(tl.int32)
    code = tl.where(_bits(v) < 0, LEVELS - level, LEVELS + level)
    _pack(tl.where(mask, code, 0), codes + _of_tile(tiles, _BYTE), count, BITS, P, B)
    step = _divided(norm, tl.full(norm.shape, LEVELS, norm.dtype))
    step = tl.where(step - step == 0.0, step, 0.0)  # what has no finite norm stays whole
    sent = level.to(v.dtype) * step
    tl.store(place, v - tl.where(_bits(v) < 0, -sent, sent), mask=mask)


@triton.jit
def qsgd_decode(
    out, tiles, of, codes, alpha, LEVELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr
):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, P)
    mask = i < count
    norm = _scale(of, tiles, i, mask, WIDTH)
    level = (_unpack(codes + _of_tile(tiles, _BYTE), count, BITS, P, B) - LEVELS).to(norm.dtype)
    value = level * _divided(norm, tl.full(norm.shape, LEVELS, norm.dtype))
    _put(out + _of_tile(tiles, _START) + i, value, alpha, mask, ADD)


@triton.jit
def natural_extract(buffer, tiles, exponents, signs, keys, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, 8)
    mask = i < count
    place = buffer + _of_tile(tiles, _START) + i
    v = tl.load(place, mask=mask, other=0.0)
    key = tl.load(keys + _of_tile(tiles, _SEGMENT))
    begin = _of_tile(tiles, _BEGIN)
    negative = v < 0.0
    if v.dtype == tl.float32:
        noise = (tl.reshape(_draws32(begin, key, B), (B // 8, 8)) & 0x7FFFFF).to(tl.int32)
        magnitude = tl.minimum(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)  # a NaN as inf, or the sum would overflow
        code = (magnitude + noise) >> 23
        sent = (code << 23).to(tl.float32, bitcast=True)
    else:
        noise = (tl.reshape(_draws64(begin, key, B), (B // 8, 8)) & 0xFFFFFFFFFFFFF).to(tl.int64)
        size = tl.abs(v)
        wide = (((v.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) + noise) >> 52) - 896
        up = noise.to(tl.float64) < size * 3.831238852164722e53  # 2¹⁷⁸
        wide = tl.where(size < 1.1754943508222875e-38, up.to(tl.int64), wide)
        wide = tl.where(size < float("inf"), tl.minimum(tl.maximum(wide, 0), 255), 255)
        code = wide.to(tl.int32)
        sent = tl.where(wide == 0, 0, (wide + 896) << 52).to(tl.float64, bitcast=True)
    sent = tl.where(code == 255, 0.0, tl.where(negative, -sent, sent))
    tl.store(exponents + _of_tile(tiles, _ELEMENT) + i, code.to(tl.uint8), mask=mask)
    _pack(negative.to(tl.int32), signs + _of_tile(tiles, _BYTE), count, 1, 8, B)
    tl.store(place, v - sent, mask=mask)


@triton.jit
def natural_decode(out, tiles, exponents, signs, alpha, ADD: tl.constexpr, B: tl.constexpr):
    count = _of_tile(tiles, _COUNT)
    i = _places(B, 8)
    mask = i < count
    code = tl.load(exponents + _of_tile(tiles, _ELEMENT) + i, mask=mask, other=0).to(tl.int32)
    negative = _unpack(signs + _of_tile(tiles, _BYTE), count, 1, 8, B) != 0
    power = ((code << 23) | (((code + 1) >> 8) << 22)).to(tl.float32, bitcast=True).to(out.dtype.element_ty)  # a NaN of 255
    _put(out + _of_tile(tiles, _START) + i, tl.where(negative, -power, power), alpha, mask, ADD)


# -- casts ------------------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def cast_extract(buffer, tiles, payload, limit, BRAIN: tl.constexpr, B: tl.constexpr):
    """`payload`: int16, the bits of what is sent."""
    i = tl.arange(0, B)
    mask = i < _of_tile(tiles, _COUNT)
    place = buffer + _of_tile(tiles, _START) + i
    v = tl.load(place, mask=mask, other=0.0)
    most = tl.load(limit).to(v.dtype)
    low = tl.where(v < -most, -most, v)
    rounded = tl.where(low > most, most, low).to(tl.float32)
    if BRAIN:  # by hand, as not every GPU has it
        bits = rounded.to(tl.int32, bitcast=True)
        nearest = (bits.to(tl.uint32, bitcast=True) + 0x7FFF + ((bits.to(tl.uint32, bitcast=True) >> 16) & 1)) >> 16
        half = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest.to(tl.int32))
        sent = (half << 16).to(tl.float32, bitcast=True)
        half = half.to(tl.int16)
    else:
        half = rounded.to(tl.float16)
        sent = half.to(tl.float32)
        half = half.to(tl.int16, bitcast=True)
    sent = tl.where(sent - sent == 0.0, sent, 0.0).to(v.dtype)
    tl.store(payload + _of_tile(tiles, _ELEMENT) + i, half, mask=mask)
    tl.store(place, v - sent, mask=mask)


@triton.jit
def cast_decode(out, tiles, payload, alpha, BRAIN: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    mask = i < _of_tile(tiles, _COUNT)
    half = tl.load(payload + _of_tile(tiles, _ELEMENT) + i, mask=mask, other=0)
    if BRAIN:
        value = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = half.to(tl.float16, bitcast=True).to(tl.float32)
    _put(out + _of_tile(tiles, _START) + i, value.to(out.dtype.element_ty), alpha, mask, ADD)


# -- accumulating -----------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _at_pointer(table, tiles, at, TYPE: tl.constexpr):
    """Where a tile begins in its segment's own tensor."""
    return tl.load(table + _of(tiles, at, _SEGMENT)).to(tl.pointer_type(TYPE)) + _of(tiles, at, _BEGIN)


@triton.jit
def _sum_up(
    e, m, d, g, mask, start, points, factors,
    HAS_M: tl.constexpr, HAS_D: tl.constexpr, HAS_X: tl.constexpr, CARRY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """What `Addition` says, of the gradients g of a tile, where the mask says so."""
    T = e.dtype.element_ty
    carry = tl.load(factors).to(T)
    gradient = tl.broadcast_to(tl.load(factors + 1).to(T), g.shape)
    decay = tl.broadcast_to(tl.load(factors + 2).to(T), g.shape)
    of_momentum = tl.broadcast_to(tl.load(factors + 4).to(T), g.shape)
    if HAS_X:
        x = tl.load(points, mask=mask, other=0.0).to(T)
    if CARRY:
        total = tl.load(e + start, mask=mask, other=0.0) * carry
    if HAS_M:
        momentum = tl.load(m + start, mask=mask, other=0.0) * tl.load(factors + 3).to(T) + g
        if HAS_X:
            momentum = tl.fma(x, decay, momentum)
        tl.store(m + start, momentum, mask=mask)
        if HAS_D:
            tl.store(d + start, tl.fma(momentum, of_momentum, tl.load(d + start, mask=mask, other=0.0)), mask=mask)
        if CARRY:
            total = tl.fma(momentum, of_momentum, total)
        else:
            total = momentum * of_momentum
        if GRADIENT:
            total = tl.fma(g, gradient, total)
            if HAS_X:
                total = tl.fma(x, decay, total)
    else:
        if CARRY:
            total = tl.fma(g, gradient, total)
        else:
            total = g * gradient
        if HAS_X:
            total = tl.fma(x, decay, total)
    tl.store(e + start, total, mask=mask)


@triton.jit
def _take_back(
    e, m, d, g, mask, start, points, factors,
    HAS_M: tl.constexpr, HAS_D: tl.constexpr, HAS_X: tl.constexpr, CARRY: tl.constexpr, GRADIENT: tl.constexpr, MU: tl.constexpr,
):  # fmt: skip
    """Reverses `_sum_up`, to rounding; g is float64. With μ = 0 nothing of the old m is left; without CARRY nothing of the old e."""
    T = e.dtype.element_ty
    added = tl.zeros(g.shape, tl.float64)
    decayed = tl.zeros(g.shape, tl.float64)
    if HAS_X:
        decayed = tl.load(factors + 2) * tl.load(points, mask=mask, other=0.0).to(tl.float64)
    if HAS_M:
        momentum = tl.load(m + start, mask=mask, other=0.0).to(tl.float64)
        added = tl.load(factors + 4) * momentum
        if HAS_D:
            tl.store(d + start, (tl.load(d + start, mask=mask, other=0.0).to(tl.float64) - added).to(T), mask=mask)
        if MU:
            momentum = (momentum - decayed - g) / tl.load(factors + 3)
        else:
            momentum = tl.zeros(g.shape, tl.float64)
        tl.store(m + start, momentum.to(T), mask=mask)
        if GRADIENT:
            added += tl.load(factors + 1) * g + decayed
    else:
        added += tl.load(factors + 1) * g + decayed
    if CARRY:
        tl.store(e + start, ((tl.load(e + start, mask=mask, other=0.0).to(tl.float64) - added) / tl.load(factors)).to(T), mask=mask)


@triton.jit
def accumulate(
    e, m, d, tiles, gradients, points, factors, done, flags,
    G: tl.constexpr, X: tl.constexpr, HAS_M: tl.constexpr, HAS_D: tl.constexpr, HAS_X: tl.constexpr,
    CARRY: tl.constexpr, GRADIENT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """What `Addition` says, but in tiles where a gradient reaches 2¹⁶ or is not finite: these are not done, which flags[0] tells."""
    at = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    count = _of(tiles, at, _COUNT)
    g = tl.load(_at_pointer(gradients, tiles, at, G) + i, mask=i < count, other=0.0).to(e.dtype.element_ty)
    large = tl.max(tl.where(tl.abs(g) < 65536.0, 0, 1), 0)
    if large > 0:
        tl.store(flags, 1)
    tl.store(done + at, 1 - large)
    start = _of(tiles, at, _START) + i
    _sum_up(e, m, d, g, i < count * (1 - large), start, _at_pointer(points, tiles, at, X) + i, factors, HAS_M, HAS_D, HAS_X, CARRY, GRADIENT)


@triton.jit
def look(tiles, gradients, done, flags, many, G: tl.constexpr, B: tl.constexpr):
    """flags[1] ← 1 when a gradient is not finite in a tile that is not done. Nothing is looked at unless flags[0] says that there are such."""
    i = tl.arange(0, B)
    for at in range(tl.program_id(0).to(tl.int64), many * tl.load(flags), tl.num_programs(0)):
        mask = i < _of(tiles, at, _COUNT) * (1 - tl.load(done + at))
        g = tl.load(_at_pointer(gradients, tiles, at, G) + i, mask=mask, other=0.0).to(tl.float32 if G.primitive_bitwidth < 64 else tl.float64)
        if tl.max((g - g != 0.0).to(tl.int32), 0) > 0:
            tl.store(flags + 1, 1)


@triton.jit
def settle(
    e, m, d, tiles, gradients, points, factors, done, flags, many,
    G: tl.constexpr, X: tl.constexpr, HAS_M: tl.constexpr, HAS_D: tl.constexpr, HAS_X: tl.constexpr,
    CARRY: tl.constexpr, GRADIENT: tl.constexpr, MU: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """After `look`: what is not done is added where all is finite, else what is done is taken away again. Nothing unless flags[0] says so."""
    i = tl.arange(0, B)
    spoilt = tl.load(flags + 1)
    for at in range(tl.program_id(0).to(tl.int64), many * tl.load(flags), tl.num_programs(0)):
        is_done = tl.load(done + at)
        start = _of(tiles, at, _START) + i
        x = _at_pointer(points, tiles, at, X) + i
        given = _at_pointer(gradients, tiles, at, G) + i
        if spoilt == 0:
            mask = i < _of(tiles, at, _COUNT) * (1 - is_done)
            g = tl.load(given, mask=mask, other=0.0).to(e.dtype.element_ty)
            _sum_up(e, m, d, g, mask, start, x, factors, HAS_M, HAS_D, HAS_X, CARRY, GRADIENT)
        else:
            back = i < _of(tiles, at, _COUNT) * is_done
            wide = tl.load(given, mask=back, other=0.0).to(tl.float64)  # of another type than g, so of another name
            _take_back(e, m, d, wide, back, start, x, factors, HAS_M, HAS_D, HAS_X, CARRY, GRADIENT, MU)


@triton.jit
def shift(parameters, tiles, x, t, factor, B: tl.constexpr):
    """parameters ← x + factor·t"""
    i = tl.arange(0, B)
    mask = i < _of_tile(tiles, _COUNT)
    start = _of_tile(tiles, _START) + i
    v = tl.load(t + start, mask=mask, other=0.0)
    by = tl.broadcast_to(tl.load(factor).to(v.dtype), v.shape)
    at = tl.program_id(0).to(tl.int64)
    tl.store(_at_pointer(parameters, tiles, at, x.dtype.element_ty) + i, tl.fma(v, by, tl.load(x + start, mask=mask, other=0.0)), mask=mask)


# -- positions --------------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def histogram(buffer, tiles, prefixes, counts, ABOVE: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, B: tl.constexpr):
    """counts[segment, digit] += keys of a (large) tile whose upper digits are the segment's prefix; the digit is (key >> SHIFT) & MASK."""
    count = _of_tile(tiles, _COUNT)
    segment = _of_tile(tiles, _SEGMENT)
    place = buffer + _of_tile(tiles, _START)
    prefix = tl.load(prefixes + segment)
    bins = tl.arange(0, _BINS)
    found = tl.zeros((_BINS,), tl.int32)
    for at in range(0, count, B):
        i = at + tl.arange(0, B)
        mask = i < count
        key = _key(tl.load(place + i, mask=mask, other=0.0))
        if not FIRST:
            mask = mask & ((key >> ABOVE) == prefix)
        digit = tl.where(mask, (key >> SHIFT) & MASK, 0).to(tl.int32)
        others = B - tl.sum(mask.to(tl.int32), 0)  # which were counted as zeros
        found += tl.histogram(digit, _BINS) - tl.where(bins == 0, others, 0)
    tl.atomic_add(counts + segment * _BINS + bins, found, mask=found > 0)


@triton.jit
def select(counts, prefixes, left, WIDTH: tl.constexpr):
    """The digit in which the left-th largest key is goes to the prefix, and `left` becomes its rank among the keys with that digit."""
    segment = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, _BINS)
    found = tl.load(counts + segment * _BINS + bins).to(tl.int64)
    rank = tl.load(left + segment)
    reach = tl.sum(found, 0) - tl.cumsum(found, 0) + found  # keys with this digit or a larger one
    digit = tl.maximum(tl.sum((reach >= rank).to(tl.int64), 0) - 1, 0)
    tl.store(left + segment, rank - tl.sum(tl.where(bins > digit, found, 0), 0))
    tl.store(prefixes + segment, (tl.load(prefixes + segment) << WIDTH) | digit)


@triton.jit
def count_above(buffer, tiles, limits, above, equal, B: tl.constexpr):
    i = tl.arange(0, B)
    at = tl.program_id(0)
    mask = i < _of_tile(tiles, _COUNT)
    key = _key(tl.load(buffer + _of_tile(tiles, _START) + i, mask=mask, other=0.0))
    limit = tl.load(limits + _of_tile(tiles, _SEGMENT))
    tl.store(above + at, tl.sum((mask & (key > limit)).to(tl.int64), 0))
    tl.store(equal + at, tl.sum((mask & (key == limit)).to(tl.int64), 0))


@triton.jit
def write_above(buffer, tiles, limits, room, before, first, positions, B: tl.constexpr):
    """Positions of keys above the limit, and of the first `room` (of the segment) that equal it; `before`: of these in the segment's tiles before."""
    i = tl.arange(0, B)
    at = tl.program_id(0)
    segment = _of_tile(tiles, _SEGMENT)
    mask = i < _of_tile(tiles, _COUNT)
    key = _key(tl.load(buffer + _of_tile(tiles, _START) + i, mask=mask, other=0.0))
    limit = tl.load(limits + segment)
    equal = (mask & (key == limit)).to(tl.int32)
    rank = tl.load(before + at) + tl.cumsum(equal, 0)
    chosen = mask & ((key > limit) | ((equal > 0) & (rank <= tl.load(room + segment))))
    place = tl.load(first + at) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(positions + place, (_of_tile(tiles, _BEGIN) + i).to(positions.dtype.element_ty), mask=chosen)


@triton.jit
def sample(buffer, ranges, tiles, keys, out, B: tl.constexpr):
    """out ← elements of each segment at places drawn by its key; all of them where the sample is as large as the segment."""
    i = tl.arange(0, B)
    mask = i < _of_tile(tiles, _COUNT)
    segment = _of_tile(tiles, _SEGMENT)
    n = tl.load(ranges + 2 * segment + 1)
    of = _of_tile(tiles, _BEGIN) + i
    drawn = _below(of, tl.load(keys + segment), n)
    place = tl.where(_of_tile(tiles, _ROW) == 1, of, drawn)
    v = tl.load(buffer + tl.load(ranges + 2 * segment) + place, mask=mask, other=0.0)
    tl.store(out + _of_tile(tiles, _START) + i, v, mask=mask)


@triton.jit
def draw_below(ranges, tiles, keys, out, B: tl.constexpr):
    """out (int64) ← segment·2³² + an integer below the segment's length, by its key."""
    i = tl.arange(0, B)
    segment = _of_tile(tiles, _SEGMENT)
    drawn = _below(_of_tile(tiles, _BEGIN) + i, tl.load(keys + segment), tl.load(ranges + 2 * segment + 1))
    tl.store(out + _of_tile(tiles, _START) + i, (segment << 32) | drawn, mask=i < _of_tile(tiles, _COUNT))


@triton.jit
def _in_block(ranges, firsts, tiles, i):
    """Places in the buffer of a tile of blocks, which begin within their segments where `firsts` says, and go round."""
    segment = _of_tile(tiles, _SEGMENT)
    n = tl.load(ranges + 2 * segment + 1)
    j = tl.load(firsts + segment) + _of_tile(tiles, _BEGIN) + i
    return tl.load(ranges + 2 * segment) + tl.where(j >= n, j - n, j)


@triton.jit
def take_blocks(buffer, ranges, firsts, tiles, payload, B: tl.constexpr):
    i = tl.arange(0, B)
    mask = i < _of_tile(tiles, _COUNT)
    place = buffer + _in_block(ranges, firsts, tiles, i)
    v = tl.load(place, mask=mask, other=0.0)
    tl.store(payload + _of_tile(tiles, _START) + i, v, mask=mask)
    tl.store(place, tl.zeros((B,), v.dtype), mask=mask)


@triton.jit
def add_blocks(out, ranges, firsts, tiles, payload, alpha, B: tl.constexpr):
    i = tl.arange(0, B)
    mask = i < _of_tile(tiles, _COUNT)
    v = tl.load(payload + _of_tile(tiles, _START) + i, mask=mask, other=0.0)
    _put(out + _in_block(ranges, firsts, tiles, i), v, alpha, mask, True)


@triton.jit
def _entries(positions, segments, ranges, numel, B: tl.constexpr):
    """(place among the entries, which are, segment, place in the buffer) of a program's entries; those out of their segment are not."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    mask = at < numel
    segment = tl.load(segments + at, mask=mask, other=0).to(tl.int64)
    position = tl.load(positions + at, mask=mask, other=0).to(tl.int64)
    mask = mask & (position >= 0) & (position < tl.load(ranges + 2 * segment + 1))
    return at, mask, segment, position


@triton.jit
def check(positions, segments, ranges, wrong, numel, B: tl.constexpr):
    """wrong ← the least segment whose positions do not ascend within it."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    mask = at < numel
    segment = tl.load(segments + at, mask=mask, other=0).to(tl.int64)
    position = tl.load(positions + at, mask=mask, other=0).to(tl.int64)
    follows = mask & (at > 0)
    same = follows & (tl.load(segments + at - 1, mask=follows, other=-1).to(tl.int64) == segment)
    before = tl.where(same, tl.load(positions + at - 1, mask=follows, other=0).to(tl.int64), -1)
    bad = mask & ((position <= before) | (position >= tl.load(ranges + 2 * segment + 1)))
    worst = tl.min(tl.where(bad, segment, 0x7FFFFFFFFFFFFFFF), 0)
    if worst < 0x7FFFFFFFFFFFFFFF:
        tl.atomic_min(wrong, worst)


@triton.jit
def take(buffer, positions, segments, ranges, values, numel, B: tl.constexpr):
    at, mask, segment, position = _entries(positions, segments, ranges, numel, B)
    place = buffer + tl.load(ranges + 2 * segment) + position
    v = tl.load(place, mask=mask, other=0.0)
    tl.store(values + at, v, mask=mask)
    tl.store(place, tl.zeros((B,), v.dtype), mask=mask)


@triton.jit
def add_at(out, positions, segments, ranges, values, alpha, numel, B: tl.constexpr):
    """In two roundings, as index_add_ has."""
    at, mask, segment, position = _entries(positions, segments, ranges, numel, B)
    place = out + tl.load(ranges + 2 * segment) + position
    v = tl.load(values + at, mask=mask, other=0.0)
    tl.store(place, tl.load(place, mask=mask, other=0.0) + v * tl.load(alpha).to(v.dtype), mask=mask)


@triton.jit
def move(buffer, positions, segments, ranges, targets, numel, B: tl.constexpr):
    _at, mask, segment, position = _entries(positions, segments, ranges, numel, B)
    place = buffer + tl.load(ranges + 2 * segment) + position
    v = tl.load(place, mask=mask, other=0.0)
    target = tl.load(targets + segment).to(tl.pointer_type(v.dtype)) + position
    tl.store(target, tl.load(target, mask=mask, other=0.0) - v, mask=mask)
    tl.store(place, tl.zeros((B,), v.dtype), mask=mask)
