// Attention over a packed row, RMS norm, a gated MLP's activation and the softmax of a head, with their gradients, for CPUs, in float32: what PyTorch computes in several
// passes over memory, in one.
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
#include <numeric>
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

// e^x for x <= 0. The product with log2(e) is taken in two parts, so that its rounding does not grow with x.
inline Floats exp_of(Floats x) {
    const Floats least = all(-87.0f), round = all(12582912.0f);
    x = x < least ? least : x;
    const Floats rounded = (x * all(LOG2_E) + round) - round;
    // ln 2 in two parts, the first of which has few enough bits that its product with an exponent is exact.
    const Floats rest = (x - rounded * all(0.693359375f)) - rounded * all(-2.12194440e-4f);
    Floats power = all(1.0f / 5040);
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) power = power * rest + all(coefficient);
    Ints exponent;
    const Floats shifted = rounded + round;
    memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent - 0x4B400000 + 127) << 23;
    Floats scale;
    memcpy(&scale, &exponent, sizeof scale);
    return power * scale;
}

// 1 / (1 + e^-x), by an exponent that is never positive.
inline Floats sigmoid_of(Floats x) {
    const Floats e = exp_of(x < Floats{} ? x : -x), one = all(1.0f);
    return (x < Floats{} ? e : one) / (one + e);
}

// Calls work(from, count) for every LANES of `length` numbers, the last few of them included.
template <class Work>
inline void in_lanes(int64_t length, int num_threads, Work work) {
#pragma omp parallel for num_threads(num_threads) if (length > 1 << 16)
    for (int64_t i = 0; i < length; i += LANES) work(i, std::min<int64_t>(LANES, length - i));
}
inline Floats load(const float* from, int64_t count) {
    if (count == LANES) return load(from);
    Floats value = {};
    memcpy(&value, from, count * sizeof(float));
    return value;
}
inline void store(float* to, Floats value, int64_t count) {
    if (count == LANES) return store(to, value);
    memcpy(to, &value, count * sizeof(float));
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
    float* out;       // [T, H, D]
    float* log_sums;  // [T, H]: of each softmax, to base 2; for the backward, may be absent
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

// Keys (or values) of all branches, each branch from a panel's beginning, in one of two orders or in both. In `columns` a panel is [D, WIDTH], so that
// a block's scores take consecutive floats for each channel. In `rows` it is [channels / WIDTH, keys, WIDTH] per branch, zero where nothing is: what
// stands there is multiplied by weights of zero.
class Packed {
  public:
    Packed(const Row& row, const float* from, int64_t per_token, int64_t per_head, bool columns, bool rows)
        : row_(row), from_(from), per_token_(per_token), per_head_(per_head), channels_((row.head_dim + WIDTH - 1) / WIDTH * WIDTH),
          first_(row.num_branches + 1) {
        for (int64_t branch = 0; branch < row.num_branches; branch++)
            first_[branch + 1] = first_[branch] + (row.starts[branch + 1] - row.starts[branch] + WIDTH - 1) / WIDTH;
        if (columns) columns_ = buffer(row.num_kv_heads * first_.back() * row.head_dim * WIDTH);
        if (rows) rows_ = buffer(row.num_kv_heads * first_.back() * channels_ * WIDTH);
    }

    int64_t channels() const { return channels_; }
    int64_t padded_length(int64_t branch) const { return (first_[branch + 1] - first_[branch]) * WIDTH; }
    float* columns(int64_t head, int64_t branch) const {
        return columns_.get() + (head * first_.back() + first_[branch]) * row_.head_dim * WIDTH;
    }
    float* rows(int64_t head, int64_t branch) const { return rows_.get() + (head * first_.back() + first_[branch]) * channels_ * WIDTH; }

    void pack(int64_t head, int64_t branch) {
        const int64_t length = row_.starts[branch + 1] - row_.starts[branch], padded = padded_length(branch), depth = row_.head_dim;
        const float* from = from_ + row_.starts[branch] * per_token_ + head * per_head_;
        if (columns_)
            for (int64_t token = 0; token < length; token++) {
                float* column = columns(head, branch) + token / WIDTH * depth * WIDTH + token % WIDTH;
                for (int64_t channel = 0; channel < depth; channel++) column[channel * WIDTH] = from[token * per_token_ + channel];
            }
        for (int64_t first = 0; rows_ && first < channels_; first += WIDTH) {
            const int64_t number = std::min<int64_t>(WIDTH, depth - first);
            float* to = rows(head, branch) + first * padded;
            if (number < WIDTH || length < padded) memset(to, 0, sizeof(float) * padded * WIDTH);
            for (int64_t token = 0; token < length; token++)
                memcpy(to + token * WIDTH, from + token * per_token_ + first, sizeof(float) * number);
        }
    }

  private:
    const Row& row_;
    const float* from_;
    int64_t per_token_, per_head_, channels_;
    std::vector<int64_t> first_;  // each branch's first panel
    Buffer columns_, rows_;
};

// sums[r][0 .. WIDTH) += sum over i of factors[i * EACH + r * EACH_ROW] vectors[i * step .. + WIDTH); the sums stay in registers
template <int NUM_ROWS, int EACH, int EACH_ROW>
__attribute__((always_inline)) inline void add_up(Floats (&sums)[NUM_ROWS][2], const float* factors, const float* vectors, int64_t step, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const Floats left = load(vectors + i * step), right = load(vectors + i * step + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < NUM_ROWS; r++) {
            const Floats factor = all(factors[i * EACH + r * EACH_ROW]);
            sums[r][0] += factor * left;
            sums[r][1] += factor * right;
        }
    }
}

// scores[r][0 .. WIDTH) = sum over channels of queries[channel][r] keys[channel][0 .. WIDTH)
inline void score(const float* queries, const float* keys, float* scores, int64_t depth) {
    Floats sums[ROWS][2] = {};
    add_up<ROWS, ROWS, 1>(sums, queries, keys, WIDTH, depth);
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
    add_up<ROWS, 1, KEYS>(sums, weights, values, WIDTH, num_keys);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        store(out + r * channels, sums[r][0]);
        store(out + r * channels + LANES, sums[r][1]);
    }
}

// Rows first_row to first_row + QUERIES of one branch and one key head; row i is query head i % G of the branch's token i / G, where G query heads
// share the key head. Keys come KEYS at a time; the softmax over them is kept as its largest score, its sum and its weighted values, and
// rescaled when a larger score comes (arXiv 2205.14135, algorithm 1).
void attend(const Row& row, const Packed& keys, const Packed& values, int64_t branch, int64_t head, int64_t first_row) {
    const int64_t depth = row.head_dim, channels = values.channels(), group = row.num_heads / row.num_kv_heads;
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
        const int64_t length = row.part_length[part], from = row.part_branch[part], padded = values.padded_length(from);
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
                    score(queries + block * ROWS * depth, keys.columns(head, from) + (first + key) * depth, scores + key, depth);

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
                    weigh(scores + begin, values.rows(head, from) + channel * padded + (first + begin) * WIDTH, shrink,
                          out + block * ROWS * channels + channel, channels, end - begin);
            }
        }
    }

    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t source = first_row + r;
        float* to = row.out + ((start + source / group) * row.num_heads + head * group + source % group) * depth;
        const float scale = 1.0f / total[r];
        for (int64_t channel = 0; channel < depth; channel++) to[channel] = out[r * channels + channel] * scale;
        if (row.log_sums)
            row.log_sums[(start + source / group) * row.num_heads + head * group + source % group] = largest[r] + std::log2(total[r]);
    }
}

struct Gradients {  // of attention; [T, H, D] and [T, Hkv, D]
    const float* grad_out;
    float *grad_query, *grad_key, *grad_value;
};

constexpr int SOME_QUERIES = 16 * ROWS;           // rows of a step of the backward: their weights over KEYS keys, and these weights' gradients, stay in cache
constexpr int SOME_KEYS = LANES >= 16 ? 8 : 4;    // whose sums over rows stay in registers

// out[key][0 .. WIDTH) += sum over rows of weights[row][key] vectors[row][0 .. WIDTH), for SOME_KEYS keys
inline void weigh_rows(const float* weights, const float* vectors, float* out, int64_t channels, int64_t num_rows) {
    Floats sums[SOME_KEYS][2] = {};
    add_up<SOME_KEYS, KEYS, 1>(sums, weights, vectors, channels, num_rows);
#pragma GCC unroll 8
    for (int key = 0; key < SOME_KEYS; key++) {
        store(out + key * channels, load(out + key * channels) + sums[key][0]);
        store(out + key * channels + LANES, load(out + key * channels + LANES) + sums[key][1]);
    }
}

// Everything of one key head; rows as in `attend`. With p the weights of the softmax, computed again from its sum, and g the gradient in a row of
// the result: the value's gradient is the sum over rows of p g; of the scores it is d = p (g value - g result), from which come the query's,
// scaling d key, and the key's, the sum over rows of scaling d query (arXiv 2205.14135, appendix B.2).
void attend_backward(const Row& row, const Gradients& gradients, const Packed& keys, const Packed& values, int64_t head) {
    const int64_t depth = row.head_dim, channels = keys.channels(), group = row.num_heads / row.num_kv_heads;
    const int64_t num_tokens = row.starts[row.num_branches];
    const Buffer memory = buffer(SOME_QUERIES * (2 * depth + 3 * channels + 2 + 2 * KEYS) + 2 * (num_tokens + SOME_KEYS) * channels);
    float *queries = memory.get(), *grads = queries + SOME_QUERIES * depth;  // by columns, as `score` reads them
    float *query_rows = grads + SOME_QUERIES * depth, *grad_rows = query_rows + SOME_QUERIES * channels;
    float *grad_queries = grad_rows + SOME_QUERIES * channels, *weights = grad_queries + SOME_QUERIES * channels;
    float *grad_scores = weights + SOME_QUERIES * KEYS, *log_sums = grad_scores + SOME_QUERIES * KEYS, *along = log_sums + SOME_QUERIES;
    float *grad_keys = along + SOME_QUERIES, *grad_values = grad_keys + (num_tokens + SOME_KEYS) * channels;
    std::fill_n(grad_keys, 2 * (num_tokens + SOME_KEYS) * channels, 0.0f);
    float ones[ROWS];
    std::fill_n(ones, ROWS, 1.0f);

    for (int64_t branch = 0; branch < row.num_branches; branch++) {
        const int64_t start = row.starts[branch], last_row = (row.starts[branch + 1] - start) * group - 1;
        const int64_t first_part = row.first_parts[branch], own_part = row.first_parts[branch + 1] - 1;
        int64_t num_context = 0;
        for (int64_t part = first_part; part < own_part; part++) num_context += row.part_length[part];
        const auto place = [&](int64_t r) { return num_context + std::min(r, last_row) / group; };
        for (int64_t first_row = 0; first_row <= last_row; first_row += SOME_QUERIES) {
            const int64_t num_rows = std::min<int64_t>(SOME_QUERIES, last_row + 1 - first_row), num_blocks = (num_rows + ROWS - 1) / ROWS;
            std::fill_n(query_rows, 3 * SOME_QUERIES * channels, 0.0f);  // and grad_rows, grad_queries
            for (int64_t r = 0; r < num_blocks * ROWS; r++) {
                const int64_t source = std::min(first_row + r, last_row), token = start + source / group, own = head * group + source % group;
                const float* query = row.query + token * row.query_token + own * row.query_head;
                const float* grad = gradients.grad_out + (token * row.num_heads + own) * depth;
                const float* out = row.out + (token * row.num_heads + own) * depth;
                float *query_column = queries + r / ROWS * depth * ROWS + r % ROWS, *grad_column = grads + r / ROWS * depth * ROWS + r % ROWS;
                for (int64_t channel = 0; channel < depth; channel++) {
                    query_column[channel * ROWS] = query[channel] * (row.scaling * LOG2_E);
                    query_rows[r * channels + channel] = query[channel] * row.scaling;
                    grad_column[channel * ROWS] = grad_rows[r * channels + channel] = grad[channel];
                }
                // Rows after the last repeat it, with weights of zero.
                log_sums[r] = first_row + r > last_row ? -HIDDEN : row.log_sums[token * row.num_heads + own];
                along[r] = std::inner_product(grad, grad + depth, out, 0.0f);
            }
            int64_t part_place = 0;
            for (int64_t part = first_part; part <= own_part; part_place += row.part_length[part++]) {
                const int64_t length = row.part_length[part], from = row.part_branch[part], padded = keys.padded_length(from);
                for (int64_t first = 0; first < length; first += KEYS) {
                    const int64_t num_keys = std::min<int64_t>(KEYS, length - first);
                    const auto seen_to = [&](int64_t r) { return std::min(num_keys, place(r) + 1 - (part_place + first)); };
                    const auto seen_from = [&](int64_t r) { return std::max<int64_t>(0, place(r) + 1 - (part_place + first) - row.window); };
                    // What any of these rows sees.
                    const int64_t lowest = seen_from(first_row) / WIDTH * WIDTH;
                    const int64_t highest = (seen_to(first_row + num_rows - 1) + WIDTH - 1) / WIDTH * WIDTH;
                    if (highest <= lowest) continue;
                    for (int64_t block = 0; block < num_blocks; block++) {
                        const int64_t top = first_row + block * ROWS;
                        const int64_t end = std::max(lowest, (seen_to(top + ROWS - 1) + WIDTH - 1) / WIDTH * WIDTH);
                        const int64_t begin = std::min(end, seen_from(top) / WIDTH * WIDTH);
                        float *own_weights = weights + block * ROWS * KEYS, *own_grads = grad_scores + block * ROWS * KEYS;
                        for (int64_t key = begin; key < end; key += WIDTH) {
                            score(queries + block * ROWS * depth, keys.columns(head, from) + (first + key) * depth, own_weights + key, depth);
                            score(grads + block * ROWS * depth, values.columns(head, from) + (first + key) * depth, own_grads + key, depth);
                        }
                        for (int r = 0; r < ROWS; r++) {
                            float *p = own_weights + r * KEYS, *d = own_grads + r * KEYS;
                            const int64_t from_key = std::clamp(seen_from(top + r), begin, end), to_key = std::clamp(seen_to(top + r), begin, end);
                            std::fill(p + begin, p + from_key, HIDDEN);
                            std::fill(p + to_key, p + end, HIDDEN);
                            std::fill(d + begin, d + from_key, 0.0f);  // what stands after a branch's last key may be anything
                            std::fill(d + to_key, d + end, 0.0f);
                            const Floats log_sum = all(log_sums[block * ROWS + r]), less = all(along[block * ROWS + r]);
                            for (int64_t key = begin; key < end; key += LANES) {
                                const Floats weight = exp2_of(load(p + key) - log_sum);
                                store(p + key, weight);
                                store(d + key, weight * (load(d + key) - less));
                            }
                            for (float* each : {p, d}) {
                                std::fill(each + lowest, each + begin, 0.0f);
                                std::fill(each + end, each + highest, 0.0f);
                            }
                        }
                        for (int64_t channel = 0; channel < channels && begin < end; channel += WIDTH)
                            weigh(own_grads + begin, keys.rows(head, from) + channel * padded + (first + begin) * WIDTH, ones,
                                  grad_queries + block * ROWS * channels + channel, channels, end - begin);
                    }
                    const int64_t token = row.starts[from] + first;
                    for (int64_t key = lowest; key < std::min(highest, num_keys); key += SOME_KEYS)
                        for (int64_t channel = 0; channel < channels; channel += WIDTH) {
                            const int64_t to = (token + key) * channels + channel;
                            weigh_rows(weights + key, grad_rows + channel, grad_values + to, channels, num_blocks * ROWS);
                            weigh_rows(grad_scores + key, query_rows + channel, grad_keys + to, channels, num_blocks * ROWS);
                        }
                }
            }
            for (int64_t r = 0; r < num_rows; r++) {
                const int64_t source = first_row + r;
                float* to = gradients.grad_query + ((start + source / group) * row.num_heads + head * group + source % group) * depth;
                for (int64_t channel = 0; channel < depth; channel++) to[channel] = grad_queries[r * channels + channel] * row.scaling;
            }
        }
    }
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t channel = 0; channel < depth; channel++) {
            gradients.grad_key[(token * row.num_kv_heads + head) * depth + channel] = grad_keys[token * channels + channel];
            gradients.grad_value[(token * row.num_kv_heads + head) * depth + channel] = grad_values[token * channels + channel];
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
    Packed keys(*row, row->key, row->key_token, row->key_head, true, false), values(*row, row->value, row->value_token, row->value_head, false, true);
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
        for (size_t i = 0; i < packing.size(); i++) {
            keys.pack(packing[i].head, packing[i].branch);
            values.pack(packing[i].head, packing[i].branch);
        }
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) attend(*row, keys, values, tasks[i].branch, tasks[i].head, tasks[i].first_row);
    }
}

// A thread takes whole key heads: their gradients are sums over rows of all branches, which so do not depend on the number of threads.
void packed_attention_backward(const Row* row, const Gradients* gradients, int num_threads) {
    Packed keys(*row, row->key, row->key_token, row->key_head, true, true), values(*row, row->value, row->value_token, row->value_head, true, false);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t head = 0; head < row->num_kv_heads; head++) {
        for (int64_t branch = 0; branch < row->num_branches; branch++) {
            keys.pack(head, branch);
            values.pack(head, branch);
        }
        attend_backward(*row, *gradients, keys, values, head);
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

void gated_silu(const float* gate, const float* up, float* out, int64_t length, int num_threads) {
    in_lanes(length, num_threads, [=](int64_t i, int64_t count) {
        const Floats x = load(gate + i, count);
        store(out + i, x * sigmoid_of(x) * load(up + i, count), count);
    });
}

void gated_silu_backward(const float* grad, const float* gate, const float* up, float* grad_gate, float* grad_up, int64_t length,
                         int num_threads) {
    in_lanes(length, num_threads, [=](int64_t i, int64_t count) {
        const Floats x = load(gate + i, count), upstream = load(grad + i, count), s = sigmoid_of(x);
        store(grad_up + i, upstream * x * s, count);
        store(grad_gate + i, upstream * load(up + i, count) * s * (all(1.0f) + x * (all(1.0f) - s)), count);
    });
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

// Of a tile of logits x [num_rows, width], per row six numbers: its largest; with e = exp(x - largest) the sums of e, e x, e^2 and x; and the
// largest before entry targets[row], which may lie outside of the tile.
void fold_logits(const float* x, int64_t stride, const int64_t* targets, float* out, int64_t num_rows, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > 1 << 16)
    for (int64_t row = 0; row < num_rows; row++) {
        const float* from = x + row * stride;
        const int64_t whole = width / LANES * LANES, target = std::clamp<int64_t>(targets[row], 0, width);
        const auto largest = [&](int64_t number) {
            const int64_t vectors = number / LANES * LANES;
            Floats most = all(HIDDEN);
            for (int64_t i = 0; i < vectors; i += LANES) most = maximum(most, load(from + i));
            float result = maximum(most);
            for (int64_t i = vectors; i < number; i++) result = std::max(result, from[i]);
            return result;
        };
        const float most = largest(width);
        Floats exps = {}, weighted = {}, squares = {};
        double plain = 0;  // a mean logit is near zero, what is added up is not
        const auto add = [&](Floats values, Floats counted) {
            const Floats e = exp_of(values - all(most)) * counted;
            exps += e;
            weighted += e * values;
            squares += e * e;
            plain += sum(values * counted);
        };
        for (int64_t i = 0; i < whole; i += LANES) add(load(from + i), all(1.0f));
        for (int64_t i = whole; i < width; i++) add(all(from[i]), Floats{1.0f});
        float* to = out + row * 6;
        to[0] = most, to[1] = sum(exps), to[2] = sum(weighted), to[3] = sum(squares), to[4] = plain;
        to[5] = target == width ? most : largest(target);
    }
}

// A tile of logits x [num_rows, width] becomes, in place, the gradient in them: with l = x - log_sums the log-probs and p = exp(l), for each entry
// -p (grad + grad_entropy (l + entropy)), and grad more at entry targets[row], which may lie outside of the tile.
void logits_gradient(float* x, int64_t stride, const int64_t* targets, const float* log_sums, const float* entropy, const float* grad,
                     const float* grad_entropy, int64_t num_rows, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > 1 << 16)
    for (int64_t row = 0; row < num_rows; row++) {
        float* own = x + row * stride;
        const int64_t whole = width / LANES * LANES;
        const auto gradient = [&](Floats values) {
            const Floats l = values - all(log_sums[row]);
            return -exp_of(l) * (all(grad[row]) + all(grad_entropy[row]) * (l + all(entropy[row])));
        };
        for (int64_t i = 0; i < whole; i += LANES) store(own + i, gradient(load(own + i)));
        for (int64_t i = whole; i < width; i++) own[i] = gradient(all(own[i]))[0];
        if (targets[row] >= 0 && targets[row] < width) own[targets[row]] += grad[row];
    }
}
}
