// An update that holds something in few places is applied there: target ← target − update, and the update is zero again.

template <class T>
int64_t positions_move(void* update_, const Segment* table, int64_t n, const int64_t* counts, const uint32_t* positions, void* const* targets,
                       int threads) {
    T* update = static_cast<T*>(update_);
    const auto offsets = offsets_of(counts, n);
    if (const int64_t wrong = check_positions(table, n, counts, positions, offsets[n])) return wrong;
    std::vector<Segment> chosen(n);
    for (int64_t s = 0; s < n; ++s) chosen[s] = {offsets[s], counts[s]};
    const auto tiles = tiles_of(chosen.data(), n);
    parallel_for(tiles.size(), useful(threads, offsets[n]), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        T *from = update + table[tile.segment].start, *to = static_cast<T*>(targets[tile.segment]);
        const int64_t end = offsets[tile.segment] + tile.end;
        for (int64_t i = offsets[tile.segment] + tile.begin; i < end; ++i) {
            if (i + AHEAD < end) __builtin_prefetch(to + positions[i + AHEAD], 1), __builtin_prefetch(from + positions[i + AHEAD], 1);
            to[positions[i]] -= from[positions[i]];
            from[positions[i]] = 0;
        }
    });
    return DONE;
}
