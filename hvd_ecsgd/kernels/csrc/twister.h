// torch's generator on the CPU: MT19937, seeded by 32 bits; 624 words at a time.
class Twister {
  public:
    static constexpr int WORDS = 624;

    explicit Twister(uint64_t seed) {
        state_[0] = static_cast<uint32_t>(seed);
        for (uint32_t j = 1; j < WORDS; ++j) state_[j] = 1812433253u * (state_[j - 1] ^ (state_[j - 1] >> 30)) + j;
    }

    void next(uint32_t* words) {
        uint32_t* s = state_;
        for (int j = 0; j < 227; ++j) s[j] = s[j + 397] ^ twisted(s[j], s[j + 1]);
        for (int j = 227; j < 623; ++j) s[j] = s[j - 227] ^ twisted(s[j], s[j + 1]);
        s[623] = s[396] ^ twisted(s[623], s[0]);
        for (int j = 0; j < WORDS; ++j) {
            uint32_t y = s[j];
            y ^= y >> 11;
            y ^= (y << 7) & 0x9d2c5680u;
            y ^= (y << 15) & 0xefc60000u;
            words[j] = y ^ (y >> 18);
        }
    }

  private:
    INLINE static uint32_t twisted(uint32_t high, uint32_t low) {
        const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
        return (y >> 1) ^ ((0u - (low & 1u)) & 0x9908b0dfu);
    }

    uint32_t state_[WORDS];
};

// Random numbers of a segment, CHUNK at a time, as torch draws them for type T: 32 bits for a float, 64 for a double, high word first.
template <class T>
struct Draws {
    // Two blocks: what a chunk needs beside them stays in the first cache.
    static constexpr int BLOCKS = 2, CHUNK = BLOCKS * Twister::WORDS * 4 / static_cast<int>(sizeof(T));  // a multiple of 8
    using U = typename Bits<T>::U;

    explicit Draws(uint64_t seed) : twister(seed) {}

    void next() {
        uint32_t words[BLOCKS * Twister::WORDS];
        for (int b = 0; b < BLOCKS; ++b) twister.next(words + b * Twister::WORDS);
        if constexpr (sizeof(T) == 4)
            std::memcpy(raw, words, sizeof words);
        else
            for (int i = 0; i < CHUNK; ++i) raw[i] = static_cast<U>(words[2 * i]) << 32 | words[2 * i + 1];
    }

    // Uniform in [0, 1), a multiple of 2⁻²⁴ or 2⁻⁵³.
    INLINE T uniform(int i) const {
        constexpr int DIGITS = std::numeric_limits<T>::digits;
        using I = typename Bits<T>::I;
        return static_cast<T>(static_cast<I>(raw[i] & ((U{1} << DIGITS) - 1))) * (T{1} / static_cast<T>(U{1} << DIGITS));
    }

    Twister twister;
    U raw[CHUNK + 64];
};
