// Random numbers of a segment, CHUNK at a time: Philox4x32-10 (Salmon et al. 2011), whose i-th block of four words is a function of i and the key, so
// any part of a stream can be computed by itself, on a GPU too. Of 32 bits for a float, of 64 for a double, low word first.
template <class T>
struct Draws {
    // What a chunk needs stays in the first cache.
    static constexpr int BLOCKS = 256, CHUNK = BLOCKS * 16 / static_cast<int>(sizeof(T));  // a multiple of 8
    using U = typename Bits<T>::U;

    explicit Draws(uint64_t key) : key(key) {}

    INLINE void next() {
        // A block's words side by side in four arrays, so that they are computed in vectors.
        uint32_t c[4][BLOCKS];
        for (int i = 0; i < BLOCKS; ++i) {
            const uint64_t counter = block + i;
            c[0][i] = static_cast<uint32_t>(counter), c[1][i] = static_cast<uint32_t>(counter >> 32), c[2][i] = c[3][i] = 0;
        }
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round) {
            for (int i = 0; i < BLOCKS; ++i) {
                const uint64_t p0 = uint64_t{0xD2511F53u} * c[0][i], p1 = uint64_t{0xCD9E8D57u} * c[2][i];
                c[0][i] = static_cast<uint32_t>(p1 >> 32) ^ c[1][i] ^ k0;
                c[2][i] = static_cast<uint32_t>(p0 >> 32) ^ c[3][i] ^ k1;
                c[1][i] = static_cast<uint32_t>(p1);
                c[3][i] = static_cast<uint32_t>(p0);
            }
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < BLOCKS; ++i) {
            if constexpr (sizeof(T) == 4)
                raw[4 * i] = c[0][i], raw[4 * i + 1] = c[1][i], raw[4 * i + 2] = c[2][i], raw[4 * i + 3] = c[3][i];
            else
                raw[2 * i] = c[0][i] | static_cast<U>(c[1][i]) << 32, raw[2 * i + 1] = c[2][i] | static_cast<U>(c[3][i]) << 32;
        }
        block += BLOCKS;
    }

    // Uniform in [0, 1), a multiple of 2⁻²⁴ or 2⁻⁵³.
    INLINE T uniform(int i) const {
        constexpr int DIGITS = std::numeric_limits<T>::digits;
        using I = typename Bits<T>::I;
        return static_cast<T>(static_cast<I>(raw[i] & ((U{1} << DIGITS) - 1))) * (T{1} / static_cast<T>(U{1} << DIGITS));
    }

    const uint64_t key;
    uint64_t block = 0;
    U raw[CHUNK + 64];
};
