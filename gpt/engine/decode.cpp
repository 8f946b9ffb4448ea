// One decoding step of GPT-2 on the CPU: the next token's logits for each of some rows.
//
// A step reads every weight once, so its time is that of reading memory. What a tensor library
// adds to it (an operator's overhead some hundred times a token, activations written and read
// back, a thread pool woken for each product) is what this file leaves out: one parallel region a
// token, no allocation, and each vector of weights loaded once for all rows.
//
// Weights are read in place, in nn.Linear's layout: (out, in), row-major, so that each output is
// the dot product of the input with one contiguous row. They are float, bfloat16, or int8 with a
// scale for each row; activations and sums are float in any case. Each output is summed by one
// thread in an order of its own, so the result depends neither on the number of threads nor on the
// rows beside it.
//
// gpt/engine/decode.py compiles this file where it runs and calls `decode_float`, `decode_bfloat16`
// or `decode_int8`; `Layer`, `Model` and `Step` are mirrored there.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using std::size_t;

struct Layer {
    const void *ln_1_weight, *ln_1_bias;
    const void *c_attn_weight, *c_attn_bias;  // (3C, C), (3C) or null
    const void *attn_proj_weight, *attn_proj_bias;
    const void *ln_2_weight, *ln_2_bias;
    const void *c_fc_weight, *c_fc_bias;
    const void *mlp_proj_weight, *mlp_proj_bias;
    // of each row of the matrices above, where these are int8
    const float *c_attn_scale, *attn_proj_scale, *c_fc_scale, *mlp_proj_scale;
};

struct Model {
    int64_t n_layer, n_head, n_embd, vocab_size;
    double epsilon;                 // of the layer norms
    const void *wte, *wpe;          // (V, C), (context, C)
    const void *ln_f_weight, *ln_f_bias;
    const void *head;               // (V, C)
    const float *wte_scale, *head_scale;  // (V), where these are int8
    const Layer *layers;
};

struct Step {
    int64_t n_rows;                 // how many rows get a token
    int64_t used;                   // positions that are filled before this step
    int64_t cache_rows, cache_length;
    int64_t n_threads;
    const int64_t *rows;            // (n_rows): which row of the cache, and of the logits
    const int64_t *tokens;          // (n_rows): the token at position `used`
    const int64_t *padding;         // (n_rows): positions on the left that no one sees
    void *keys, *values;            // (n_layer, cache_rows, n_head, cache_length, D)
    float *logits;                  // (cache_rows, V)
    float *scratch;                 // `decode_scratch` floats
};

// --- vectors --------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 8;
#else
constexpr int LANES = 4, ACCUMULATORS = 16;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct bfloat16 {
    uint16_t bits;  // the upper half of a float
};

inline Floats load(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats load(const bfloat16 *from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Ints) << 16);
}

inline Floats load(const int8_t *from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    // GCC 12 would widen number by number, in a tenth of the speed
#if defined(__AVX512F__)
    const Ints wide = (Ints)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    const Ints wide = (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)&bytes));
#else
    const Ints wide = __builtin_convertvector(bytes, Ints);
#endif
    return __builtin_convertvector(wide, Floats);
}

inline void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline float one(const float *from) { return *from; }

inline float one(const bfloat16 *from) {
    uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float one(const int8_t *from) { return float(*from); }

inline void put(float *to, float value) { *to = value; }

inline void put(bfloat16 *to, float value) {  // to nearest, ties to even, as PyTorch
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = value != value;
    to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// a * b + c, rounded once wherever the processor can. It is written out where many shapes of one
// product are compiled: left to itself a compiler fuses some of them and others not (GCC breaks up
// chains of fused ones on AMD's processors), and a row's last bits would tell what lies beside it.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

inline Floats all(float value) { return Floats{} + value; }

// The sum of N lanes, half onto half.
template <int N, class V>
inline float sum(V v) {
    if constexpr (N == 2) {
        return v[0] + v[1];
    } else {
        typedef float Half __attribute__((vector_size(N * 2)));
        Half low, high;
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char *>(&v) + sizeof low, sizeof high);
        return sum<N / 2>(low + high);
    }
}

inline float sum(Floats v) { return sum<LANES>(v); }

// e^x to about one unit in the last place: 2^n times a polynomial over ln(2)/2 around 0.
inline Floats exp(Floats x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;  // 2^n stays a normal number
    x = x > all(88.0f) ? all(88.0f) : x;
    const Floats magic = all(12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number
    const Floats n = (x * 1.44269504f + magic) - magic;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Floats)power;
}

// f of each of n numbers, in place; the last few by way of a full vector.
template <class F>
inline void each(float *x, int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, f(load(x + i)));
    if (i < n) {
        float rest[LANES] = {};
        std::memcpy(rest, x + i, size_t(n - i) * sizeof(float));
        store(rest, f(load(rest)));
        std::memcpy(x + i, rest, size_t(n - i) * sizeof(float));
    }
}

// --- who does what --------------------------------------------------------------------------------

struct Worker {
    int64_t index, count;

    // This worker's share of `n` things, in whole cache lines of 16 floats.
    void share(int64_t n, int64_t &begin, int64_t &end) const {
        const int64_t lines = (n + 15) / 16;
        begin = lines * index / count * 16;
        end = lines * (index + 1) / count * 16;
        if (begin > n) begin = n;
        if (end > n) end = n;
    }
};

inline void wait_for_all() {
#pragma omp barrier
}

// --- matrix products ------------------------------------------------------------------------------

// R rows of weights times B rows of inputs, each dot product in registers: out is (R, B).
template <class T, int R, int B>
__attribute__((noinline)) void dots(const T *weight, const float *x, int64_t stride, int64_t n_in,
                                    float *out) {
    Floats acc[R][B] = {};
    int64_t k = 0;
    for (; k + LANES <= n_in; k += LANES) {
        Floats w[R];
        for (int r = 0; r < R; ++r) {
            w[r] = load(weight + r * n_in + k);
            // the same place in the next block of rows, into the second-level cache
            __builtin_prefetch(weight + (r + R) * n_in + k, 0, 2);
        }
        for (int b = 0; b < B; ++b) {
            const Floats xs = load(x + b * stride + k);
            for (int r = 0; r < R; ++r) acc[r][b] = fused(w[r], xs, acc[r][b]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            float total = sum(acc[r][b]);
            for (int64_t i = k; i < n_in; ++i)
                total = fused(one(weight + r * n_in + i), x[b * stride + i], total);
            out[r * B + b] = total;
        }
}

// The kernel for n_rows of inputs, 1 to 8.
template <class T, int R>
inline void dots_of(int64_t n_rows, const T *weight, const float *x, int64_t stride, int64_t n_in,
                    float *out) {
    switch (n_rows) {
        case 1: return dots<T, R, 1>(weight, x, stride, n_in, out);
        case 2: return dots<T, R, 2>(weight, x, stride, n_in, out);
        case 3: return dots<T, R, 3>(weight, x, stride, n_in, out);
        case 4: return dots<T, R, 4>(weight, x, stride, n_in, out);
        case 5: return dots<T, R, 5>(weight, x, stride, n_in, out);
        case 6: return dots<T, R, 6>(weight, x, stride, n_in, out);
        case 7: return dots<T, R, 7>(weight, x, stride, n_in, out);
        default: return dots<T, R, 8>(weight, x, stride, n_in, out);
    }
}

// use(output, row, dot product) for R outputs and every row. Up to 8 rows share one reading of the
// weights; those beyond come in further rounds, while the weights are in the nearest cache.
template <class T, int R, class Use>
inline void block(const T *weight, const float *x, int64_t stride, int64_t n_in, int64_t n_rows,
                  int64_t first, Use use) {
    for (int64_t row = 0; row < n_rows; row += 8) {
        const int64_t n = n_rows - row < 8 ? n_rows - row : 8;
        float out[R * 8];
        dots_of<T, R>(n, weight, x + row * stride, stride, n_in, out);
        for (int64_t r = 0; r < R; ++r)
            for (int64_t b = 0; b < n; ++b) use(first + r, row + b, out[r * n + b]);
    }
}

// use(output, row, dot product) for the outputs begin … end and every row; x is (n_rows, stride).
template <class T, class Use>
inline void product(const void *weights, const float *x, int64_t stride, int64_t n_in,
                    int64_t n_rows, int64_t begin, int64_t end, Use use) {
    const T *weight = static_cast<const T *>(weights);
    // As many rows of weights side by side as the registers hold sums for: one input is at memory
    // speed with eight of them, a sixth slower with four.
    constexpr int MANY = 8, SOME = 4, FEW = ACCUMULATORS / 8;
    int64_t o = begin;
    if (n_rows <= ACCUMULATORS / MANY)
        for (; o + MANY <= end; o += MANY)
            block<T, MANY>(weight + o * n_in, x, stride, n_in, n_rows, o, use);
    else if (n_rows <= ACCUMULATORS / SOME)
        for (; o + SOME <= end; o += SOME)
            block<T, SOME>(weight + o * n_in, x, stride, n_in, n_rows, o, use);
    else
        for (; o + FEW <= end; o += FEW)
            block<T, FEW>(weight + o * n_in, x, stride, n_in, n_rows, o, use);
    for (; o < end; ++o) block<T, 1>(weight + o * n_in, x, stride, n_in, n_rows, o, use);
}

// What stands for `value` in row `o` of a matrix of W: of int8 it is so many times the row's scale.
template <class W>
inline float scaled(float value, const float *scale, int64_t o) {
    if constexpr (sizeof(W) == 1)
        return value * scale[o];
    else
        return value;
}

// --- the parts of a block -------------------------------------------------------------------------

template <class T>
void layer_norm(const float *x, const void *weight, const void *bias, int64_t n, double epsilon,
                float *out) {
    const T *w = static_cast<const T *>(weight), *b = static_cast<const T *>(bias);
    const int64_t whole = n / LANES * LANES;
    Floats total = {};
    for (int64_t i = 0; i < whole; i += LANES) total += load(x + i);
    float mean = sum(total);
    for (int64_t i = whole; i < n; ++i) mean += x[i];
    mean /= float(n);
    Floats square = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats d = load(x + i) - mean;
        square += d * d;
    }
    float variance = sum(square);
    for (int64_t i = whole; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(variance / float(n) + float(epsilon));
    for (int64_t i = 0; i < whole; i += LANES)
        store(out + i, (load(x + i) - mean) * scale * load(w + i) + load(b + i));
    for (int64_t i = whole; i < n; ++i) out[i] = (x[i] - mean) * scale * one(w + i) + one(b + i);
}

// One head of one row: softmax(q K') V over the positions first … last; scores has room for all.
template <class T>
void attend(const float *q, const T *keys, const T *values, int64_t first, int64_t last, int64_t D,
            float *scores, float *out) {
    const float scale = 1.0f / std::sqrt(float(D));
    const int64_t whole = D / LANES * LANES, n = last - first + 1;
    float highest = -INFINITY;
    for (int64_t p = first; p <= last; ++p) {
        const T *key = keys + p * D;
        Floats acc = {};
        for (int64_t d = 0; d < whole; d += LANES) acc += load(q + d) * load(key + d);
        float score = sum(acc);
        for (int64_t d = whole; d < D; ++d) score += q[d] * one(key + d);
        scores[p - first] = score *= scale;
        if (score > highest) highest = score;
    }
    each(scores, n, [=](Floats s) { return exp(s - highest); });
    float total = 0;
    for (int64_t p = 0; p < n; ++p) total += scores[p];
    const T *value = values + first * D;
    int64_t d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) {
        Floats acc[4] = {};
        for (int64_t p = 0; p < n; ++p)
            for (int i = 0; i < 4; ++i) acc[i] += scores[p] * load(value + p * D + d + i * LANES);
        for (int i = 0; i < 4; ++i) store(out + d + i * LANES, acc[i] / total);
    }
    for (; d + LANES <= D; d += LANES) {
        Floats acc = {};
        for (int64_t p = 0; p < n; ++p) acc += scores[p] * load(value + p * D + d);
        store(out + d, acc / total);
    }
    for (; d < D; ++d) {
        float acc = 0;
        for (int64_t p = 0; p < n; ++p) acc += scores[p] * one(value + p * D + d);
        out[d] = acc / total;
    }
}

// GPT-2's GELU, 0.5 x (1 + tanh(u)), written as x / (1 + e^-2u).
inline Floats gelu(Floats x) {
    const Floats u = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-2.0f * u));
}

// --- the step -------------------------------------------------------------------------------------

// What `decode_scratch` makes room for. Shared: x, attention's output (C each), q k v (3C), the
// MLP's inner layer (4C), for every row; each worker's own: normalized x for every row, scores.
// The matrices are of W, all else and the cache of T.
template <class W, class T>
void work(const Model &model, const Step &step, Worker worker) {
    const int64_t C = model.n_embd, H = model.n_head, D = C / H, B = step.n_rows;
    float *const x = step.scratch, *const y = x + B * C, *const qkv = y + B * C;
    float *const inner = qkv + B * 3 * C;
    float *const own = inner + B * 4 * C + worker.index * (B * C + step.cache_length);
    float *const normal = own, *const scores = own + B * C;
    const int64_t position = step.used;
    int64_t begin, end;

    const auto norm = [&](const void *weight, const void *bias) {
        for (int64_t b = 0; b < B; ++b)
            layer_norm<T>(x + b * C, weight, bias, C, model.epsilon, normal + b * C);
    };

    worker.share(C, begin, end);
    for (int64_t b = 0; b < B; ++b) {
        const W *token = static_cast<const W *>(model.wte) + step.tokens[b] * C;
        const T *place = static_cast<const T *>(model.wpe) + (position - step.padding[b]) * C;
        for (int64_t i = begin; i < end; ++i)
            x[b * C + i] =
                scaled<W>(one(token + i), model.wte_scale, step.tokens[b]) + one(place + i);
    }
    wait_for_all();

    for (int64_t l = 0; l < model.n_layer; ++l) {
        const Layer &layer = model.layers[l];

        // every worker normalizes for itself: it is little, and saves a barrier
        norm(layer.ln_1_weight, layer.ln_1_bias);
        const T *bias = static_cast<const T *>(layer.c_attn_bias);
        worker.share(3 * C, begin, end);
        product<W>(layer.c_attn_weight, normal, C, C, B, begin, end,
                   [=, &layer](int64_t o, int64_t b, float value) {
                       qkv[b * 3 * C + o] = scaled<W>(value, layer.c_attn_scale, o) +
                                            (bias ? one(bias + o) : 0.0f);
                   });
        wait_for_all();

        for (int64_t i = worker.index; i < B * H; i += worker.count) {
            const int64_t b = i / H, h = i % H;
            const int64_t head = (l * step.cache_rows + step.rows[b]) * H + h;
            const int64_t at = head * step.cache_length * D;
            T *keys = static_cast<T *>(step.keys) + at;
            T *values = static_cast<T *>(step.values) + at;
            const float *q = qkv + b * 3 * C + h * D;
            for (int64_t d = 0; d < D; ++d) {
                put(keys + position * D + d, q[C + d]);
                put(values + position * D + d, q[2 * C + d]);
            }
            attend<T>(q, keys, values, step.padding[b], position, D, scores, y + b * C + h * D);
        }
        wait_for_all();

        const auto add = [=](const float *scale, const void *weight) {
            const T *bias = static_cast<const T *>(weight);
            return [=](int64_t o, int64_t b, float value) {
                x[b * C + o] += scaled<W>(value, scale, o) + one(bias + o);
            };
        };
        worker.share(C, begin, end);
        product<W>(layer.attn_proj_weight, y, C, C, B, begin, end,
                   add(layer.attn_proj_scale, layer.attn_proj_bias));
        wait_for_all();

        norm(layer.ln_2_weight, layer.ln_2_bias);
        const T *inner_bias = static_cast<const T *>(layer.c_fc_bias);
        worker.share(4 * C, begin, end);
        product<W>(layer.c_fc_weight, normal, C, C, B, begin, end,
                   [=, &layer](int64_t o, int64_t b, float value) {
                       inner[b * 4 * C + o] =
                           scaled<W>(value, layer.c_fc_scale, o) + one(inner_bias + o);
                   });
        for (int64_t b = 0; b < B; ++b) each(inner + b * 4 * C + begin, end - begin, gelu);
        wait_for_all();

        worker.share(C, begin, end);
        product<W>(layer.mlp_proj_weight, inner, 4 * C, 4 * C, B, begin, end,
                   add(layer.mlp_proj_scale, layer.mlp_proj_bias));
        wait_for_all();
    }

    norm(model.ln_f_weight, model.ln_f_bias);
    worker.share(model.vocab_size, begin, end);
    product<W>(model.head, normal, C, C, B, begin, end, [&](int64_t o, int64_t b, float value) {
        step.logits[step.rows[b] * model.vocab_size + o] = scaled<W>(value, model.head_scale, o);
    });
}

template <class W, class T>
void decode(const Model *model, const Step *step) {
#ifdef _OPENMP
#pragma omp parallel num_threads(int(step->n_threads))
    work<W, T>(*model, *step, Worker{omp_get_thread_num(), omp_get_num_threads()});
#else
    work<W, T>(*model, *step, Worker{0, 1});
#endif
}

}  // namespace

extern "C" {

// Floats of scratch for a step of so many rows, threads and positions.
int64_t decode_scratch(const Model *model, const Step *step) {
    const int64_t B = step->n_rows, C = model->n_embd;
    return 9 * B * C + step->n_threads * (B * C + step->cache_length);
}

void decode_float(const Model *model, const Step *step) { decode<float, float>(model, step); }

void decode_bfloat16(const Model *model, const Step *step) {
    decode<bfloat16, bfloat16>(model, step);
}

void decode_int8(const Model *model, const Step *step) { decode<int8_t, float>(model, step); }
}
