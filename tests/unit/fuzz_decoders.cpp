// Coverage-guided fuzzing of the kernels that decode payloads: whatever a payload holds, nothing beyond it or beyond the result is read or written.
//
//     fuzz SECONDS SEED      prints executions, edges that the first inputs reached, edges reached at the end, and how many payloads were refused
//     fuzz control           reads a payload that is a byte too short, which the address sanitizer must see
//
// Built with the kernels under -fsanitize=address,undefined and their edges counted by -fsanitize-coverage=trace-pc, this file without. Payloads have the
// size that the callers in Python have checked; what they hold, counts of positions included, is the input's.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <memory>
#include <random>
#include <vector>

struct Segment {
    int64_t start, numel;
};
#define TABLE const Segment *, int64_t
#define PAYLOADS const uint8_t *const *, int64_t, double, int
#define ASKED int, int, double *, int64_t *
extern "C" {
int64_t hvd_ecsgd_sign_decode(int, void*, TABLE, PAYLOADS, ASKED, int64_t, int);
int64_t hvd_ecsgd_ternary_decode(int, void*, TABLE, PAYLOADS, ASKED, int);
int64_t hvd_ecsgd_qsgd_decode(int, void*, TABLE, PAYLOADS, ASKED, int64_t, int64_t, int, int);
int64_t hvd_ecsgd_natural_decode(int, void*, TABLE, PAYLOADS, ASKED, int);
int64_t hvd_ecsgd_cast_decode(int, void*, TABLE, const uint16_t*, int, double, int, int);
int64_t hvd_ecsgd_block_top_k_decode(int, void*, TABLE, const uint8_t*, int64_t, int64_t, const int64_t*, double, int, int);
int64_t hvd_ecsgd_positions_decode(int, void*, TABLE, const int64_t*, const uint32_t*, const void*, double, int, int64_t, int);
}

namespace {

constexpr size_t MAP = 1 << 16;
uint8_t edges[MAP];
uintptr_t before;
constexpr int TARGETS = 9;

using Bytes = std::vector<uint8_t>;

// Memory of exactly this size, which the sanitizer watches the ends of, filled with the input from `at` on, over and over.
std::unique_ptr<uint8_t[]> filled(const Bytes& input, size_t at, size_t size) {
    std::unique_ptr<uint8_t[]> made(new uint8_t[size]);
    for (size_t i = 0; i < size; ++i) made[i] = input[at + i % (input.size() - at)];
    return made;
}

// input: target, options, shape of the table, and what the payload holds.
int64_t decode(const Bytes& input, size_t missing = 0) {
    const int target = input[0] % TARGETS, type = input[1] & 1, add = input[1] >> 1 & 1;
    const size_t width = type ? 8 : 4;
    const int64_t sizes[4][3] = {{5, 0, 70}, {1, 300, 3}, {64, 64, 0}, {1000, 17, 2}};
    const int64_t* size = sizes[input[2] % 4];
    const Segment table[3] = {{0, size[0]}, {size[0], size[1]}, {size[0] + size[1], size[2]}};
    const int64_t numel = size[0] + size[1] + size[2];
    std::unique_ptr<uint8_t[]> out(new uint8_t[numel * width]());
    const auto per = [&](int64_t unit) {
        int64_t total = 0;
        for (int64_t n : {size[0], size[1], size[2]}) total += (n + unit - 1) / unit;
        return static_cast<size_t>(total);
    };
    const auto payload = [&](size_t bytes) { return filled(input, 3, bytes - missing); };
    // One payload or three, and whether something is asked of the result.
    const int64_t n = input[1] >> 4 & 1 ? 3 : 1;
    const bool asks = input[1] >> 5 & 1;
    double sums[3];
    int64_t nonzero[3];
    const auto together = [&](size_t bytes, auto kernel, auto... settings) {
        const auto first = payload(bytes), second = payload(bytes), third = payload(bytes);
        const uint8_t* const payloads[3] = {first.get(), second.get(), third.get()};
        return kernel(type, out.get(), table, 3, payloads, n, 0.5, add, input[1] >> 6 & 1, input[1] >> 7, asks ? sums : nullptr, asks ? nonzero : nullptr,
                      settings..., 1);
    };
    switch (target) {
        case 0: return together(3 * width + per(8), hvd_ecsgd_sign_decode, 0);
        case 1: {
            size_t rows = 0;
            for (int64_t n : {size[0], size[1], size[2]}) rows += n ? (n + 8) / 9 : 1;
            return together(rows * width + per(8), hvd_ecsgd_sign_decode, 9);
        }
        case 2: return together(3 * width + per(4), hvd_ecsgd_ternary_decode);
        case 3: return together(numel + per(8), hvd_ecsgd_natural_decode);
        case 4: return hvd_ecsgd_cast_decode(type, out.get(), table, 3, reinterpret_cast<uint16_t*>(payload(2 * numel).get()), input[1] >> 2 & 1, 0.5, add, 1);
        case 5:
        case 6: {
            const int bits = target == 5 ? 8 : 1 << (1 + (input[1] >> 2 & 1));
            return together(per(16) * width + per(8 / bits), hvd_ecsgd_qsgd_decode, 1, 16, bits);
        }
        case 7: {
            const int64_t block = 16, k_full = 2;
            int64_t k_last[3], entries = 0;
            for (int s = 0; s < 3; ++s) k_last[s] = size[s] % block ? 1 : 0, entries += size[s] / block * k_full + k_last[s];
            return hvd_ecsgd_block_top_k_decode(type, out.get(), table, 3, payload(entries * (width + 2)).get(), block, k_full, k_last, 0.5, add, 1);
        }
        default: {
            const int64_t given = input[1] >> 2;
            int64_t counts[3];
            for (int s = 0; s < 3; ++s) counts[s] = static_cast<int8_t>(input[3 + s % (input.size() - 3)]);
            const auto positions = payload(given * 4), values = payload(given * width);
            return hvd_ecsgd_positions_decode(type, out.get(), table, 3, counts, reinterpret_cast<uint32_t*>(positions.get()), values.get(), 0.5, add, given, 1);
        }
    }
}

size_t reached() {
    size_t count = 0;
    for (uint8_t edge : edges) count += edge;
    return count;
}

Bytes first_input(int target, std::mt19937& random) {
    Bytes input{static_cast<uint8_t>(target), static_cast<uint8_t>(random()), static_cast<uint8_t>(random())};
    for (int i = 0; i < 4; ++i) input.push_back(static_cast<uint8_t>(random() % 4));
    return input;
}

void mutate(Bytes& input, std::mt19937& random) {
    for (int i = 1 + random() % 4; i > 0; --i) {
        const size_t at = random() % input.size();
        const uint8_t telling[] = {0, 1, 2, 15, 16, 0x7f, 0x80, 0xff};
        switch (random() % 6) {
            case 0: input[at] ^= static_cast<uint8_t>(1 << random() % 8); break;
            case 1: input[at] = static_cast<uint8_t>(random()); break;
            case 2: input[at] = telling[random() % sizeof telling]; break;
            case 3: input[at] = static_cast<uint8_t>(input[at] + 1); break;
            case 4: if (input.size() < 200) input.insert(input.begin() + 3, telling[random() % sizeof telling]); break;
            default: if (input.size() > 8) input.erase(input.begin() + 3 + random() % (input.size() - 3));
        }
    }
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
    const auto here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    edges[(here ^ before >> 1) % MAP] = 1;
    before = here;
}

int main(int argc, char** argv) {
    if (argc == 2) {
        decode({0, 0, 0, 1}, 1);
        return 0;
    }
    std::mt19937 random(static_cast<uint32_t>(std::atoi(argv[2])));
    std::vector<Bytes> corpus;
    for (int i = 0; i < 4 * TARGETS; ++i) corpus.push_back(first_input(i % TARGETS, random));
    long refused = 0, executions = 0;
    const auto run = [&](const Bytes& input) {
        const size_t known = reached();
        before = 0;
        refused += decode(input) < 0;
        ++executions;
        return reached() > known;
    };
    for (const Bytes& input : corpus) run(input);
    const size_t at_first = reached();
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[1]));
    while (std::chrono::steady_clock::now() < end) {
        Bytes input = corpus[random() % corpus.size()];
        mutate(input, random);
        if (run(input)) corpus.push_back(input);
    }
    std::printf("%ld %zu %zu %ld\n", executions, at_first, reached(), refused);
}
