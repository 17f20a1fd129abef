// What is taken of gradients of which nothing is kept: of a copy of each part in the first cache, so no buffer is filled and read again.

// 1, or 0 when a gradient holds an inf or NaN: then the payload means nothing.
template <class T, class Extraction>
int64_t extract_from(const Segment* table, int64_t n, int type, const void* const* gradients, const Extraction& extraction, int threads) {
    const int64_t part = extraction.part();
    const auto tiles = tiles_of(table, n, part * std::max<int64_t>(1, TILE / part));
    std::atomic<bool> finite{true};
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        const int64_t s = tiles[t].segment;
        std::vector<T> copy(part);
        for (int64_t begin = tiles[t].begin; begin < tiles[t].end && finite.load(std::memory_order_relaxed); begin += part) {
            const int64_t end = std::min(begin + part, tiles[t].end);
            if (suspect(type, gradients[s], begin, end, false)) {
                finite = false;
                return;
            }
            for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
                alignas(64) T wide[CHUNK];
                const int64_t count = std::min(CHUNK, end - chunk);
                const T* g = in_type(type, gradients[s], chunk, count, wide);
                std::copy(g, g + count, copy.data() + (chunk - begin));
            }
            extraction.take(s, begin, end, copy.data());
        }
    });
    return finite;
}

template <class T>
int64_t cast_extract_from(const Segment* table, int64_t n, int type, const void* const* gradients, uint16_t* payload, int brain, double limit, int threads) {
    return extract_from<T>(table, n, type, gradients, CastExtraction<T>{offsets_of(table, n, 1), payload, brain != 0, static_cast<T>(limit)}, threads);
}

// `bucket` is at most a tile.
template <class T>
int64_t qsgd_extract_from(const Segment* table, int64_t n, int type, const void* const* gradients, uint8_t* payload, const uint64_t* keys, int64_t levels,
                          int64_t bucket, int bits, int largest, int threads) {
    return extract_from<T>(table, n, type, gradients, QsgdExtraction<T>(table, n, payload, keys, levels, bucket, bits, largest), threads);
}
