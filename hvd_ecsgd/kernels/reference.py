"""Reference kernels: torch on any device, NumPy's bit packing on CPU."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import CompressionError
from ..segments import Segment
from ..verdicts import Verdict, doubt

__all__ = ["all_finite", "check_positions", "check_rows", "column_sums", "column_sums_size", "damaged_positions", "draws", "fingerprint", "negative",
           "pack_bits", "pack_codes",
           "signs", "top_k_indices", "top_k_rows", "uniform", "unpack_bits", "unpack_codes"]  # fmt: skip


def damaged_positions(segment: Segment, numel: int, who: str) -> CompressionError:
    """What is wrong with positions of a payload that do not ascend from 0 and below `numel`."""
    return CompressionError(
        f"{who}: the payload's positions for parameter '{segment.name}' must ascend below {numel} elements, and do not: it was damaged on its "
        "way, or comes from ranks with other settings."
    )


def check_rows(positions: torch.Tensor, numel: int, segment: Segment, who: str) -> torch.Tensor:
    """`positions`, from a payload. Raises `CompressionError` unless each row ascends from 0 and below `numel`; of a GPU that is a `doubt`, and
    what is returned is in range."""
    if positions.numel() == 0:
        return positions
    wrong = (positions[:, 0].min() < 0) | (positions[:, -1].max() >= numel) | (positions[:, 1:] <= positions[:, :-1]).any()
    doubt(wrong, lambda: damaged_positions(segment, numel, who))
    return positions if positions.device.type == "cpu" else positions.clamp(0, numel - 1)


def check_positions(positions: torch.Tensor, segment: Segment, who: str) -> torch.Tensor:
    """As `check_rows`, of positions within the segment."""
    return check_rows(positions.view(1, -1), segment.numel, segment, who).view(-1)


def all_finite(t: torch.Tensor) -> Verdict:
    """True when no element of the floating-point `t` is inf or NaN. One pass over `t` without temporaries in the usual case."""
    if t.numel() == 0:
        return True
    if t.device.type != "cpu":  # finite float32 do not overflow a double sum
        return torch.isfinite(t).all() if t.dtype == torch.float64 else torch.isfinite(t.sum(dtype=torch.float64))
    total = t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)
    # A finite sum proves it; an infinite one may be the overflow of finite numbers.
    return bool(torch.isfinite(total)) or bool(torch.isfinite(t).all())


_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(t: torch.Tensor) -> torch.Tensor:
    """A 0-dim int64 of the bits of `t`, where `t` is: equal for equal bits, and another one when a single element differs (64 bits otherwise).

    Σ bits_i·w_i modulo 2⁶⁴ with odd weights w_i that depend on the place alone; whole numbers, so no order of summation changes it.
    """
    bits = t.detach().contiguous().view(-1).view(_INTEGERS[t.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK]  # of int64 no copy is made: never written to
        weights = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=t.device).mul_(-7046029254386353131)
        weights.bitwise_xor_(weights >> 31).mul_(-4417276706812531889).bitwise_or_(1)
        total += weights.mul_(part).sum()
    return total


_COLUMNS = 251  # a prime, so that rows and columns of a matrix that trade places change columns here


def column_sums(t: torch.Tensor) -> torch.Tensor:
    """Some hundred int64 that tell whether `t` was changed in place, in one pass at the memory's speed; where `t` is. Of up to 502 float32 the bits.

    The bits of `t`, as 64-bit words in the order of memory, in rows of 251; the sums of the columns modulo 2⁶⁴, and the words that fill no row. One
    element that changes always changes them, and several do but by chance, also when they trade places (not a multiple of 251 words apart).
    """
    t = t.detach()
    flat = t.as_strided((t.numel(),), (1,)) if _fills_its_memory(t) else t.reshape(-1)
    per_word = 8 // t.element_size()
    if flat.storage_offset() % per_word:
        flat = flat.clone()  # a view into another tensor, where words do not begin
    whole = flat.numel() // per_word * per_word
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(_INTEGERS[t.element_size()]).to(torch.int64)
    rows = words.numel() // _COLUMNS
    if rows < 2:
        return torch.cat([words, rest])
    body = words[: rows * _COLUMNS].view(rows, _COLUMNS)
    # NumPy's sum of columns runs at the memory's speed, torch's at a third of it.
    sums = torch.from_numpy(body.numpy().sum(0)) if t.device.type == "cpu" else body.sum(0)
    return torch.cat([sums, words[rows * _COLUMNS :], rest])


def column_sums_size(t: torch.Tensor) -> int:
    """Elements of `column_sums` of `t`."""
    words, rest = divmod(t.numel(), 8 // t.element_size())
    rows = words // _COLUMNS
    return (words if rows < 2 else _COLUMNS + words - rows * _COLUMNS) + rest


def _fills_its_memory(t: torch.Tensor) -> bool:
    """Every element between the first and the last in memory is one of `t`: contiguous, channels_last, transposed."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return t.numel() > 0


_MULTIPLIERS, _WEYL, _WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def draws(key: int, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The first n random integers of a 64-bit `key` (int64): 32 bits of each for a float32 `dtype`, 64 for a float64.

    Philox4x32-10 (Salmon et al. 2011): words 4i to 4i + 3 are a function of the key and i alone, so compiled kernels, on a GPU too, draw the same.
    """
    per_block = 4 if dtype == torch.float32 else 2
    result = torch.empty(-(-n // per_block), per_block, dtype=torch.int64, device=device)
    for start in range(0, len(result), _CHUNK // 16):
        part = result[start : start + _CHUNK // 16]
        counter = torch.arange(start, start + len(part), dtype=torch.int64, device=device)
        c0, c1 = counter & _WORD, counter >> 32
        c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
        k0, k1 = key & _WORD, key >> 32
        for _ in range(10):
            p0, p1 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])  # modulo 2⁶⁴, as if it had no sign
            c0, c1 = (p1 >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0), p1 & _WORD
            c2, c3 = (p0 >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1), p0 & _WORD
            k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
        words = (c0, c1, c2, c3) if per_block == 4 else (c0 | c1 << 32, c2 | c3 << 32)
        for i, word in enumerate(words):
            part[:, i] = word
    return result.view(-1)[:n]


def uniform(key: int, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """n numbers in [0, 1) of a `key`: the `draws` modulo 2²⁴ times 2⁻²⁴, for float64 modulo 2⁵³ times 2⁻⁵³."""
    digits = 24 if dtype == torch.float32 else 53
    return draws(key, n, dtype, device).bitwise_and_((1 << digits) - 1).to(dtype).mul_(2.0**-digits)


def negative(v: torch.Tensor) -> torch.Tensor:
    """Bool vector: v < 0. NumPy's comparison is an order of magnitude faster than torch's on CPU."""
    if v.device.type == "cpu":
        return torch.from_numpy(np.less(v.numpy(), 0))
    return v < 0


def signs(bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """-scale where `bits` (bool) is set and +scale elsewhere, exactly, in the type of `scale`, which broadcasts."""
    # Arithmetic, because torch.where takes ten times as long on CPU; in bytes as far as they go.
    return bits.view(torch.int8).mul(-2).add_(1).to(scale.dtype).mul_(scale)


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack a bool vector of d elements into ⌈d/8⌉ bytes, first element in the lowest bit; the last byte is filled with zeros."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    n_bytes = -(-bits.numel() // 8)
    padded = torch.zeros(n_bytes * 8, dtype=torch.uint8, device=bits.device)
    padded[: bits.numel()] = bits
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The bool vector of `numel` elements that `pack_bits` packed."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel, bitorder="little")).view(torch.bool)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) & weights) != 0).view(-1)[:numel]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack a uint8 vector of d codes below 2^bits (`bits` 2 or 4) into ⌈d·bits/8⌉ bytes, first code in the lowest bits, the last byte filled
    with zeros."""
    per_byte = 8 // bits
    numel = codes.numel()
    if numel % per_byte:
        codes = torch.cat([codes, codes.new_zeros(per_byte - numel % per_byte)])
    if codes.device.type == "cpu":
        lanes = codes.numpy().reshape(-1, per_byte)
        packed = lanes[:, 0].copy()
        for i in range(1, per_byte):
            packed |= lanes[:, i] << bits * i
        return torch.from_numpy(packed)
    columns = codes.view(-1, per_byte)
    result = columns[:, 0].clone()
    for i in range(1, per_byte):
        result |= columns[:, i] << bits * i
    return result


def unpack_codes(packed: torch.Tensor, numel: int, bits: int) -> torch.Tensor:
    """The uint8 vector of `numel` codes that `pack_codes` packed."""
    if packed.device.type == "cpu":
        return torch.from_numpy(_CODES_OF_BYTE[bits][packed.numpy()].view(np.uint8)[:numel])
    mask = (1 << bits) - 1
    return torch.stack([(packed >> bits * i) & mask for i in range(8 // bits)], 1).view(-1)[:numel]


def _codes_of_byte(bits: int) -> np.ndarray:
    """For each byte its codes, as one number of the memory layout [first code, second code, …]."""
    codes = (np.arange(256)[:, None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
    return codes.astype(np.uint8).view(np.uint16 if bits == 4 else np.uint32).reshape(256)


_CODES_OF_BYTE = {bits: _codes_of_byte(bits) for bits in (2, 4)}


def top_k_indices(v: torch.Tensor, k: int) -> torch.Tensor:
    """Ascending positions (int64) of the k elements of largest magnitude of the 1-D `v`; ties go to the lowest index, NaN counts as largest."""
    if v.device.type == "cpu" and v.dtype in (torch.float32, torch.float64) and (likely := _top_k_of_likely(v, k)) is not None:
        return likely
    if v.device.type != "cpu":
        return top_k_rows(v.view(1, -1), k).view(-1)
    magnitude = v.abs()
    values, indices = torch.topk(magnitude, k, sorted=False)
    smallest = values.min()
    if smallest.isnan():  # topk takes NaN as largest, comparisons do not
        magnitude.nan_to_num_(nan=float("inf"), posinf=float("inf"))
        smallest = values.nan_to_num_(nan=float("inf"), posinf=float("inf")).min()
    if int((magnitude >= smallest).sum()) == k:
        return indices.sort().values
    larger = (magnitude > smallest).nonzero().view(-1)
    equal = (magnitude == smallest).nonzero().view(-1)[: k - larger.numel()]
    return torch.cat([larger, equal]).sort().values


_SAMPLE = 1 << 14


def _top_k_of_likely(v: torch.Tensor, k: int) -> torch.Tensor | None:
    """`top_k_indices` of a long `v` by looking closely at those alone that reach a threshold, which a sample gives: an order of magnitude faster than
    torch.topk. None where that tells nothing: `v` is short, has mostly equal magnitudes, or the sample misleads."""
    if v.numel() < 4 * _SAMPLE:
        return None
    magnitude = v.abs().numpy()
    sample = magnitude[:: v.numel() // _SAMPLE]
    expected = sample.size * k / v.numel()
    rank = sample.size - int(expected + 4 * math.sqrt(expected) + 8)
    if rank < 0:
        return None
    least = np.partition(sample, rank)[rank]  # NaN sorts as largest
    places = np.flatnonzero(~(magnitude < least))
    if not k <= places.size <= 4 * k + v.numel() // 64:
        return None
    values = np.nan_to_num(magnitude[places], nan=np.inf, posinf=np.inf)
    smallest = np.partition(values, values.size - k)[values.size - k]
    larger = places[values > smallest]
    return torch.from_numpy(np.sort(np.concatenate([larger, places[values == smallest][: k - larger.size]])))


def top_k_rows(m: torch.Tensor, k: int) -> torch.Tensor:
    """For each row of the matrix `m` the ascending positions (int64) of its k elements of largest magnitude, ties and NaN as `top_k_indices`. Nothing
    is read from a GPU."""
    magnitude = m.abs()
    if m.device.type != "cpu":
        return _top_k_rows_of_keys(magnitude, k)
    values, indices = torch.topk(magnitude, k, dim=1, sorted=False)
    smallest = values.min(1, keepdim=True).values
    tied = (~(magnitude < smallest)).sum(1) != k  # also true of rows with a NaN, unless all is taken
    if bool(tied.any()):
        in_doubt = magnitude[tied].nan_to_num_(nan=float("inf"), posinf=float("inf"))  # a NaN is no larger than an inf
        indices[tied] = torch.sort(in_doubt, dim=1, descending=True, stable=True).indices[:, :k]
    return indices.sort(dim=1).values


def _top_k_rows_of_keys(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """`top_k_rows` of magnitudes, by keys no two of which are alike in a row; of float64, for which there are none in 64 bits, by sorting."""
    if magnitude.dtype == torch.float32:
        first = torch.arange(magnitude.shape[1] - 1, -1, -1, dtype=torch.int64, device=magnitude.device)
        keys = magnitude.view(torch.int32).clamp(max=0x7F800000).to(torch.int64).mul_(1 << 32).add_(first)  # a NaN is no larger than an inf
        chosen = torch.topk(keys, k, dim=1, sorted=False).indices
    else:
        plain = magnitude.nan_to_num(nan=float("inf"), posinf=float("inf"))
        chosen = torch.sort(plain, dim=1, descending=True, stable=True).indices[:, :k]
    return chosen.sort(dim=1).values
