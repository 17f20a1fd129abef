// QSGD: each element a multiple of its bucket's norm/levels, rounded at random. Payload: the norms of all buckets, then each segment's codes.

// Of 4 or 2 bits.
inline void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* bytes) {
    if (bits == 4) {
        for (int64_t i = 0; i < (n + 1) / 2; ++i) bytes[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    } else {
        for (int64_t i = 0; i < (n + 3) / 4; ++i)
            bytes[i] = static_cast<uint8_t>(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
    }
}

// One bucket's part of a chunk: codes of p, whose residual stays. Draws are there for a vector behind the last.
template <class T>
INLINE static void quantise(T* p, int64_t n, T norm, T levels, const typename Bits<T>::U* draws, uint8_t* codes) {
    using L = Lanes<T>;
    using I = typename Bits<T>::I;
    const T step = norm / levels;
    const auto divisor = L::all(norm > 0 ? norm : T(1)), most = L::all(levels), left = L::all(std::isfinite(step) ? step : T(0));
    const auto sign = L::all_bits(static_cast<I>(Bits<T>::SIGN));
    replace_each(p, n, [&](auto v, int64_t i) ISA {
        const auto ratio = L::magnitude(v) / divisor;
        auto x = uniform(draws + i) + ratio * most;
        x = L::select(x < most, x, most);
        auto level = of_whole(to_whole(x));
        // With the sign of v, and 0 of a NaN.
        level = reinterpret_cast<typename L::V>((reinterpret_cast<typename L::M>(level) & (ratio == ratio)) | (reinterpret_cast<typename L::M>(v) & sign));
        store_codes(to_whole(level + most), codes + i, n - i);
        return v - level * left;
    });
}

template <class T>
T qsgd_norm(const T* p, int64_t n, bool largest) {
    return largest ? largest_magnitude(p, n) : norm_of<T>(long_sum_of(p, n, true), true);
}

// norms ← those of buckets that are longer than a tile, in parts that threads share; the sums are in the order of `qsgd_norm`.
template <class T>
void long_norms(const T* buffer, const std::vector<Segment>& buckets, bool largest, int threads, T* norms) {
    const auto tiles = tiles_of(buckets.data(), buckets.size());
    std::vector<double> parts(tiles.size());
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        const T* p = buffer + buckets[tiles[t].segment].start + tiles[t].begin;
        const int64_t count = tiles[t].end - tiles[t].begin;
        parts[t] = largest ? static_cast<double>(largest_magnitude(p, count)) : sum_of(p, count, true);
    });
    std::vector<double> totals(buckets.size(), 0.0);
    for (size_t t = 0; t < tiles.size(); ++t) {
        double& total = totals[tiles[t].segment];
        total = !largest ? total + parts[t] : total >= parts[t] || total != total ? total : parts[t];  // a NaN stays
    }
    for (size_t i = 0; i < totals.size(); ++i) norms[i] = largest ? static_cast<T>(totals[i]) : norm_of<T>(totals[i], true);
}

inline std::vector<int64_t> code_offsets(const Segment* table, int64_t n, int bits) {
    return offsets_of(table, n, 8 / bits);
}

template <class T>
struct QsgdExtraction {  // as CastExtraction; `norms` are those of all buckets where these are longer than a part
    const Segment* table;
    std::vector<int64_t> rows, bytes;
    uint8_t* payload;
    const uint64_t* keys;
    T levels;
    int64_t bucket;
    int bits;
    bool largest;
    std::vector<T> norms;

    QsgdExtraction(const Segment* table_, int64_t n, uint8_t* payload_, const uint64_t* keys_, int64_t levels_, int64_t bucket_, int bits_, int largest_)
        : table(table_), rows(offsets_of(table_, n, bucket_)), bytes(code_offsets(table_, n, bits_)), payload(payload_), keys(keys_),
          levels(static_cast<T>(levels_)), bucket(bucket_), bits(bits_), largest(largest_ != 0) {}

    // Parts end where a byte of codes does, and where a bucket does whose norm is not known yet.
    int64_t unit() const { return bucket > TILE ? TILE : std::lcm<int64_t>(bucket, 8); }
    int64_t part() const { return unit() * std::max<int64_t>(1, 2048 / unit()); }

    INLINE void take(int64_t s, int64_t from, int64_t to, T* p) const {
        constexpr int CHUNK = Draws<T>::CHUNK;
        Draws<T> draws(keys[s]);
        uint8_t unpacked[CHUNK + 8];
        T norm = 0;
        for (int64_t chunk = from; chunk < to; chunk += CHUNK) {
            const int64_t end = std::min<int64_t>(chunk + CHUNK, to);
            uint8_t *packed = payload + rows.back() * sizeof(T) + bytes[s] + chunk * bits / 8, *codes = bits == 8 ? packed : unpacked;
            draws.from(chunk);
            for (int64_t begin = chunk; begin < end;) {
                const int64_t row = begin / bucket, stop = std::min(end, (row + 1) * bucket);
                if (!norms.empty()) {
                    norm = norms[rows[s] + row];
                } else if (begin == row * bucket) {
                    norm = qsgd_norm(p + (begin - from), std::min(bucket, table[s].numel - begin), largest);
                    std::memcpy(payload + (rows[s] + row) * sizeof(T), &norm, sizeof(T));
                }
                quantise(p + (begin - from), stop - begin, norm, levels, draws.raw + (begin - chunk), codes + (begin - chunk));
                begin = stop;
            }
            if (bits == 8) continue;
            std::fill(codes + (end - chunk), codes + (end - chunk) + 8, uint8_t{0});
            pack_codes(codes, end - chunk, bits, packed);
        }
    }
};

template <class T>
int64_t qsgd_extract(void* buffer_, const Segment* table, int64_t n, uint8_t* payload, const uint64_t* keys, int64_t levels, int64_t bucket, int bits,
                     int largest, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    threads = useful(threads, elements(table, n));
    QsgdExtraction<T> extraction(table, n, payload, keys, levels, bucket, bits, largest);
    if (bucket > TILE) {
        std::vector<Segment> buckets;
        for (int64_t s = 0; s < n; ++s)
            for (int64_t begin = 0; begin < table[s].numel; begin += bucket)
                buckets.push_back({table[s].start + begin, std::min(bucket, table[s].numel - begin)});
        extraction.norms.resize(buckets.size());
        long_norms(buffer, buckets, extraction.largest, threads, extraction.norms.data());
        std::memcpy(payload, extraction.norms.data(), buckets.size() * sizeof(T));
    }
    const int64_t unit = extraction.unit();
    const auto tiles = tiles_of(table, n, unit * std::max<int64_t>(1, TILE / unit));
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        extraction.take(tile.segment, tile.begin, tile.end, buffer + table[tile.segment].start + tile.begin);
    });
    return DONE;
}

// codes ← n of 8, 4 or 2 bits, and zeros for a vector behind the last.
inline void unpack_codes(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
    if (bits == 8) {
        std::memcpy(codes, packed, n);
    } else if (bits == 4) {
        for (int64_t i = 0; i < (n + 1) / 2; ++i) codes[2 * i] = packed[i] & 15, codes[2 * i + 1] = packed[i] >> 4;
    } else {
        for (int64_t i = 0; i < (n + 3) / 4; ++i)
            codes[4 * i] = packed[i] & 3, codes[4 * i + 1] = packed[i] >> 2 & 3, codes[4 * i + 2] = packed[i] >> 4 & 3, codes[4 * i + 3] = packed[i] >> 6;
    }
    std::fill(codes + n, codes + n + 64, uint8_t{0});
}

template <class T>
int64_t qsgd_decode(void* out, const Segment* table, int64_t n, const Payloads& payloads, const Asked& asked, int64_t levels_, int64_t bucket, int bits,
                    int threads) {
    using L = Lanes<T>;
    const auto rows = offsets_of(table, n, bucket), bytes = code_offsets(table, n, bits);
    const T levels = static_cast<T>(levels_);
    return decode_all<T>(out, table, n, payloads, asked, threads, [&](const uint8_t* payload, int64_t s, int64_t begin, int64_t count, T* values) ISA {
        const auto most = L::all(levels);
        uint8_t codes[DECODED_AT_ONCE + 64];
        unpack_codes(payload + rows[n] * sizeof(T) + bytes[s] + begin * bits / 8, count, bits, codes);
        each_row(begin, begin + count, bucket, [&](int64_t row, int64_t from, int64_t to) ISA {
            T norm;
            std::memcpy(&norm, payload + (rows[s] + row) * sizeof(T), sizeof(T));
            const auto step = L::all(norm / levels);
            for (int64_t i = from - begin; i < to - begin; i += L::N) {  // also behind the bucket
                typename Codes<T>::Code c;
                std::memcpy(&c, codes + i, sizeof c);
                L::store(values + i, (of_codes(c) - most) * step);
            }
        });
        return [values](int64_t i) ISA { return L::load(values + i); };
    });
}
