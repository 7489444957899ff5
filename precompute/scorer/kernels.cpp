// Attention over a packed row, RMS norm with its gradient and log-sum-exp for CPUs, in float32: what PyTorch computes in several passes over
// memory, in one.
// Called through precompute/scorer/kernels.py, which says what each computes and checks what it is given.
//
// Written with GCC's vector types: LANES floats to a register, whatever the machine has. Both products of attention run on a block of
// ROWS queries x WIDTH keys (or value channels) whose sums stay in registers: ROWS x 2 of them, which leaves three for what is multiplied.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 6
#endif
#endif

constexpr int WIDTH = 2 * LANES;
constexpr int KEYS = 256;               // at a time: their keys and values stay in a core's second cache while QUERIES pass over them
constexpr int QUERIES = 32 * ROWS;      // rows of one task; a row is one query head of one token
constexpr float HIDDEN = -1e30f;        // the score of a key that a query does not see; finite, so that HIDDEN - HIDDEN is no NaN
constexpr float LOG2_E = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }
inline Floats all(float value) { return value - Floats{}; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
template <int STEP = LANES / 2, class Combine>
inline float reduce(Floats a, Combine combine) {  // every lane with the one STEP away, then half of that away, to the neighbour
    Ints other;
    for (int lane = 0; lane < LANES; lane++) other[lane] = lane ^ STEP;
    a = combine(a, __builtin_shuffle(a, other));
    if constexpr (STEP > 1) return reduce<STEP / 2>(a, combine);
    return a[0];
}
inline float maximum(Floats a) { return reduce(a, [](Floats b, Floats c) { return maximum(b, c); }); }
inline float sum(Floats a) { return reduce(a, [](Floats b, Floats c) { return b + c; }); }

// 2^x for x <= 0 to 2e-7 of itself: the nearest integer goes to the exponent's bits, the rest, at most a half, through a polynomial (least
// squares of the relative error). Below 2^-126 it is 0. A NaN stays one: the comparison is false for it.
inline Floats exp2_of(Floats x) {
    const Floats least = all(-127.0f), round = all(12582912.0f);  // 1.5 * 2^23: a float of that size has no bits for fractions
    x = x < least ? least : x;
    const Floats rounded = x + round, rest = x - (rounded - round);
    Floats power = all(1.53375768e-4f);
    for (float coefficient : {1.33998604e-3f, 9.61851953e-3f, 5.55032900e-2f, 2.40226466e-1f, 6.93147206e-1f, 1.0f})
        power = power * rest + all(coefficient);
    Ints exponent;
    memcpy(&exponent, &rounded, sizeof exponent);
    exponent = (exponent - 0x4B400000 + 127) << 23;
    Floats scale;
    memcpy(&scale, &exponent, sizeof scale);
    return power * scale;
}

// Uninitialized floats at a cache line's beginning.
struct Free {
    void operator()(float* memory) const { operator delete[](memory, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;
Buffer buffer(size_t length) { return Buffer(new (std::align_val_t(64)) float[length]); }

// --- attention --------------------------------------------------------------------------------------------------------------------------

struct Row {  // what kernels.py hands over; strides in floats
    const float *query, *key, *value;
    float* out;  // [T, H, D]
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t num_branches;
    const int64_t* starts;       // [num_branches + 1]: branch b is tokens starts[b] to starts[b + 1]
    const int64_t* first_parts;  // [num_branches + 1]: branch b's path is parts first_parts[b] to first_parts[b + 1], itself the last
    const int64_t* part_branch;  // the path's tokens are the first part_length[p] of branch part_branch[p]
    const int64_t* part_length;
    int64_t window;
    float scaling;
};

// Keys and values of all branches, each branch from a panel's beginning. A panel of keys is [D, WIDTH], so that a block's scores take consecutive
// floats for each channel; values are [channels / WIDTH, keys, WIDTH] per branch, zero where nothing is: what stands there is multiplied by weights of zero.
class PackedKeys {
  public:
    explicit PackedKeys(const Row& row) : row_(row), channels_((row.head_dim + WIDTH - 1) / WIDTH * WIDTH), first_(row.num_branches + 1) {
        for (int64_t branch = 0; branch < row.num_branches; branch++)
            first_[branch + 1] = first_[branch] + (row.starts[branch + 1] - row.starts[branch] + WIDTH - 1) / WIDTH;
        keys_ = buffer(row.num_kv_heads * first_.back() * row.head_dim * WIDTH);
        values_ = buffer(row.num_kv_heads * first_.back() * channels_ * WIDTH);
    }

    int64_t channels() const { return channels_; }
    int64_t padded_length(int64_t branch) const { return (first_[branch + 1] - first_[branch]) * WIDTH; }
    float* keys(int64_t head, int64_t branch) const { return keys_.get() + (head * first_.back() + first_[branch]) * row_.head_dim * WIDTH; }
    float* values(int64_t head, int64_t branch) const { return values_.get() + (head * first_.back() + first_[branch]) * channels_ * WIDTH; }

    void pack(int64_t head, int64_t branch) {
        const int64_t length = row_.starts[branch + 1] - row_.starts[branch], padded = padded_length(branch), depth = row_.head_dim;
        const float* key = row_.key + row_.starts[branch] * row_.key_token + head * row_.key_head;
        const float* value = row_.value + row_.starts[branch] * row_.value_token + head * row_.value_head;
        float *to_keys = keys(head, branch), *to_values = values(head, branch);
        for (int64_t token = 0; token < length; token++) {
            float* column = to_keys + token / WIDTH * depth * WIDTH + token % WIDTH;
            for (int64_t channel = 0; channel < depth; channel++) column[channel * WIDTH] = key[token * row_.key_token + channel];
        }
        for (int64_t first = 0; first < channels_; first += WIDTH) {
            const int64_t number = std::min<int64_t>(WIDTH, depth - first);
            float* to = to_values + first * padded;
            if (number < WIDTH || length < padded) memset(to, 0, sizeof(float) * padded * WIDTH);
            for (int64_t token = 0; token < length; token++)
                memcpy(to + token * WIDTH, value + token * row_.value_token + first, sizeof(float) * number);
        }
    }

  private:
    const Row& row_;
    int64_t channels_;
    std::vector<int64_t> first_;  // each branch's first panel
    Buffer keys_, values_;
};

// scores[r][0 .. WIDTH) = sum over channels of queries[channel][r] keys[channel][0 .. WIDTH)
inline void score(const float* queries, const float* keys, float* scores, int64_t depth) {
    Floats sums[ROWS][2] = {};
    for (int64_t channel = 0; channel < depth; channel++) {
        const Floats left = load(keys + channel * WIDTH), right = load(keys + channel * WIDTH + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const Floats query = all(queries[channel * ROWS + r]);
            sums[r][0] += query * left;
            sums[r][1] += query * right;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        store(scores + r * KEYS, sums[r][0]);
        store(scores + r * KEYS + LANES, sums[r][1]);
    }
}

// out[r][0 .. WIDTH) = shrink[r] out[r] + sum over keys of weights[r][key] values[key][0 .. WIDTH)
inline void weigh(const float* weights, const float* values, const float* shrink, float* out, int64_t channels, int64_t num_keys) {
    Floats sums[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        sums[r][0] = load(out + r * channels) * all(shrink[r]);
        sums[r][1] = load(out + r * channels + LANES) * all(shrink[r]);
    }
    for (int64_t key = 0; key < num_keys; key++) {
        const Floats left = load(values + key * WIDTH), right = load(values + key * WIDTH + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const Floats weight = all(weights[r * KEYS + key]);
            sums[r][0] += weight * left;
            sums[r][1] += weight * right;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        store(out + r * channels, sums[r][0]);
        store(out + r * channels + LANES, sums[r][1]);
    }
}

// Rows first_row to first_row + QUERIES of one branch and one key head; row i is query head i % G of the branch's token i / G, where G query heads
// share the key head. Keys come KEYS at a time; the softmax over them is kept as its largest score, its sum and its weighted values, and
// rescaled when a larger score comes (arXiv 2205.14135, algorithm 1).
void attend(const Row& row, const PackedKeys& packed, int64_t branch, int64_t head, int64_t first_row) {
    const int64_t depth = row.head_dim, channels = packed.channels(), group = row.num_heads / row.num_kv_heads;
    const int64_t start = row.starts[branch], last_row = (row.starts[branch + 1] - start) * group - 1;
    const int64_t num_rows = std::min<int64_t>(QUERIES, last_row + 1 - first_row), num_blocks = (num_rows + ROWS - 1) / ROWS;
    const int64_t first_part = row.first_parts[branch], own_part = row.first_parts[branch + 1] - 1;
    int64_t num_context = 0;
    for (int64_t part = first_part; part < own_part; part++) num_context += row.part_length[part];
    const auto place = [&](int64_t r) { return num_context + std::min(r, last_row) / group; };  // of row r's token on its path

    static thread_local Buffer memory;
    static thread_local int64_t held = 0;
    if (held < QUERIES * (depth + channels + 2) + ROWS * KEYS) memory = buffer(held = QUERIES * (depth + channels + 2) + ROWS * KEYS);
    float *queries = memory.get(), *out = queries + QUERIES * depth, *largest = out + QUERIES * channels, *total = largest + QUERIES;
    float* scores = total + QUERIES;

    for (int64_t r = 0; r < num_blocks * ROWS; r++) {  // rows after the last repeat it
        const int64_t source = std::min(first_row + r, last_row);
        const float* query = row.query + (start + source / group) * row.query_token + (head * group + source % group) * row.query_head;
        float* column = queries + r / ROWS * depth * ROWS + r % ROWS;
        for (int64_t channel = 0; channel < depth; channel++) column[channel * ROWS] = query[channel] * (row.scaling * LOG2_E);
    }
    std::fill_n(out, num_blocks * ROWS * channels, 0.0f);
    std::fill_n(largest, num_blocks * ROWS, HIDDEN);
    std::fill_n(total, num_blocks * ROWS, 0.0f);

    int64_t part_place = 0;
    for (int64_t part = first_part; part <= own_part; part_place += row.part_length[part++]) {
        const int64_t length = row.part_length[part], from = row.part_branch[part], padded = packed.padded_length(from);
        for (int64_t first = 0; first < length; first += KEYS) {
            const int64_t num_keys = std::min<int64_t>(KEYS, length - first);
            // Of the keys at hand, row r sees those from seen_from(r) to before seen_to(r).
            const auto seen_to = [&](int64_t r) { return std::min(num_keys, place(r) + 1 - (part_place + first)); };
            const auto seen_from = [&](int64_t r) { return std::max<int64_t>(0, place(r) + 1 - (part_place + first) - row.window); };
            for (int64_t block = 0; block < num_blocks; block++) {
                const int64_t top = first_row + block * ROWS;
                const int64_t begin = seen_from(top) / WIDTH * WIDTH, end = (seen_to(top + ROWS - 1) + WIDTH - 1) / WIDTH * WIDTH;
                if (end <= begin) continue;
                for (int64_t key = begin; key < end; key += WIDTH)
                    score(queries + block * ROWS * depth, packed.keys(head, from) + (first + key) * depth, scores + key, depth);

                alignas(64) float shrink[(ROWS + LANES - 1) / LANES * LANES] = {};
                for (int r = 0; r < ROWS; r++) {
                    float *own = scores + r * KEYS, &most = largest[block * ROWS + r];
                    std::fill(own + begin, own + std::clamp(seen_from(top + r), begin, end), HIDDEN);
                    std::fill(own + std::clamp(seen_to(top + r), begin, end), own + end, HIDDEN);
                    Floats left = load(own + begin), right = load(own + begin + LANES);
                    for (int64_t key = begin + WIDTH; key < end; key += WIDTH) {
                        left = maximum(left, load(own + key));
                        right = maximum(right, load(own + key + LANES));
                    }
                    shrink[r] = most;
                    most = std::max(most, maximum(maximum(left, right)));
                    shrink[r] -= most;
                }
                for (int r = 0; r < ROWS; r += LANES) store(shrink + r, exp2_of(load(shrink + r)));
                for (int r = 0; r < ROWS; r++) {
                    float *own = scores + r * KEYS, &all_weights = total[block * ROWS + r];
                    const Floats most = all(largest[block * ROWS + r]);
                    Floats left = {}, right = {};
                    for (int64_t key = begin; key < end; key += WIDTH) {
                        const Floats a = exp2_of(load(own + key) - most), b = exp2_of(load(own + key + LANES) - most);
                        store(own + key, a);
                        store(own + key + LANES, b);
                        left += a;
                        right += b;
                    }
                    all_weights = all_weights * shrink[r] + sum(left + right);
                }
                for (int64_t channel = 0; channel < channels; channel += WIDTH)
                    weigh(scores + begin, packed.values(head, from) + channel * padded + (first + begin) * WIDTH, shrink,
                          out + block * ROWS * channels + channel, channels, end - begin);
            }
        }
    }

    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t source = first_row + r;
        float* to = row.out + ((start + source / group) * row.num_heads + head * group + source % group) * depth;
        const float scale = 1.0f / total[r];
        for (int64_t channel = 0; channel < depth; channel++) to[channel] = out[r * channels + channel] * scale;
    }
}

// sum over i of a[i] b[i]
inline float product(const float* a, const float* b, int64_t width) {
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int k = 0; k < 4; k++) sums[k] += load(a + i + k * LANES) * load(b + i + k * LANES);
    float total = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; i < width; i++) total += a[i] * b[i];
    return total;
}

}  // namespace

extern "C" {

void packed_attention(const Row* row, int num_threads) {
    PackedKeys packed(*row);
    struct Task { int64_t branch, head, first_row; };
    std::vector<Task> tasks, packing;
    for (int64_t branch = 0; branch < row->num_branches; branch++)
        for (int64_t head = 0; head < row->num_kv_heads; head++) {
            packing.push_back({branch, head, 0});
            const int64_t num_rows = (row->starts[branch + 1] - row->starts[branch]) * (row->num_heads / row->num_kv_heads);
            for (int64_t first = 0; first < num_rows; first += QUERIES) tasks.push_back({branch, head, first});
        }
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < packing.size(); i++) packed.pack(packing[i].head, packing[i].branch);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) attend(*row, packed, tasks[i].branch, tasks[i].head, tasks[i].first_row);
    }
}

void rms_norm(const float* x, const float* weight, float* out, int64_t num_rows, int64_t width, float epsilon, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > 1 << 16)
    for (int64_t row = 0; row < num_rows; row++) {
        const float* from = x + row * width;
        float* to = out + row * width;
        const float scale = 1.0f / std::sqrt(product(from, from, width) / width + epsilon);
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale * weight[i];
    }
}

// With s = 1 / sqrt(mean(x^2) + epsilon): grad_x = s (weight grad - x s^2 mean(weight grad x)), grad_weight = the sum over rows of grad x s.
// ROWS_AT_A_TIME rows are added up at a time, and those sums in double, so that the result does not depend on the number of threads.
void rms_norm_backward(const float* grad, const float* x, const float* weight, float* grad_x, float* grad_weight, int64_t num_rows,
                       int64_t width, float epsilon, int num_threads) {
    constexpr int64_t ROWS_AT_A_TIME = 64;
    const int64_t num_parts = (num_rows + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    std::vector<float> parts(num_parts * width);
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > 1 << 16)
    for (int64_t part = 0; part < num_parts; part++) {
        float* sums = parts.data() + part * width;
        std::vector<float> weighted(width);
        for (int64_t row = part * ROWS_AT_A_TIME; row < std::min(num_rows, (part + 1) * ROWS_AT_A_TIME); row++) {
            const float *from = x + row * width, *upstream = grad + row * width;
            float* to = grad_x + row * width;
            const float scale = 1.0f / std::sqrt(product(from, from, width) / width + epsilon);
            for (int64_t i = 0; i < width; i++) {
                weighted[i] = weight[i] * upstream[i];
                sums[i] += upstream[i] * from[i] * scale;
            }
            const float along = product(weighted.data(), from, width) / width * scale * scale;
            for (int64_t i = 0; i < width; i++) to[i] = scale * (weighted[i] - from[i] * along);
        }
    }
    std::vector<double> total(width);
    for (int64_t part = 0; part < num_parts; part++)
        for (int64_t i = 0; i < width; i++) total[i] += parts[part * width + i];
    std::copy(total.begin(), total.end(), grad_weight);
}

void log_sum_exp(const float* x, int64_t stride, float* out, int64_t num_rows, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > 1 << 16)
    for (int64_t row = 0; row < num_rows; row++) {
        const float* from = x + row * stride;
        const int64_t whole = width / WIDTH * WIDTH;
        Floats left = all(HIDDEN), right = left;
        for (int64_t i = 0; i < whole; i += WIDTH) {
            left = maximum(left, load(from + i));
            right = maximum(right, load(from + i + LANES));
        }
        float most = maximum(maximum(left, right)), total = 0;
        for (int64_t i = whole; i < width; i++) most = std::max(most, from[i]);
        left = right = Floats{};
        const Floats log2_e = all(LOG2_E);
        for (int64_t i = 0; i < whole; i += WIDTH) {
            left += exp2_of((load(from + i) - all(most)) * log2_e);
            right += exp2_of((load(from + i + LANES) - all(most)) * log2_e);
        }
        for (int64_t i = whole; i < width; i++) total += exp2_of(all((from[i] - most) * LOG2_E))[0];
        out[row] = most + std::log(total + sum(left + right));
    }
}
}
