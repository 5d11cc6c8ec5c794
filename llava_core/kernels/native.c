/* A decoder layer's operations other than matrix products, for few tokens: norms, rotations, gates, and attention over
 * a paged cache. In float32 and bfloat16, rounded once, at the end of each function. Compiled on the machine that runs
 * it (native.py), with torch's own OpenMP threads. Knows addresses and strides, counted in elements, and no tensors.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Limits of the stack arrays: a head's dimensions, and the heads of a group that are computed together. native.py
 * passes no larger heads. */
#define MAX_DIM 256
#define MAX_GROUP 16
/* Tokens whose scores are computed at a time. */
#define TILE 64
/* Multiplications in attention below which a second thread costs more than it saves. */
#define MANY 400000

/* `half` is 1 for bfloat16 and 0 for float32, a constant at every call site, so that no loop branches on it. */

INLINE float get(const void *from, int64_t at, int half)
{
    float value;
    if (!half)
        return ((const float *)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void put(void *to, int64_t at, float value, int half)
{
    uint32_t bits;
    if (!half) {
        ((float *)to)[at] = value;
        return;
    }
    memcpy(&bits, &value, sizeof bits);
    /* Round to nearest, ties to even. NaN stays NaN, whatever its bits. */
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    ((uint16_t *)to)[at] = value != value ? 0x7fc0 : rounded;
}

/* Numbers per vector; the compiler maps vectors to the processor's registers. */
#define LANES 16
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE lanes load(const void *from, int64_t at, int half)
{
    lanes value;
    if (half) {
        halves bits;
        memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
        return (lanes)(__builtin_convertvector(bits, words) << 16);
    }
    memcpy(&value, (const float *)from + at, sizeof value);
    return value;
}

/* One vector with the sums of LANES vectors: in each round, half of each vector is added to its other half, and two
 * vectors become one. */
INLINE lanes add_up(lanes *vectors)
{
#define ROUND(count, ...)                                                                                              \
    for (int64_t i = 0; i < count; i++)                                                                                \
        vectors[i] = __builtin_shuffle(vectors[i], vectors[i + count], (words){__VA_ARGS__}) +                         \
                     __builtin_shuffle(vectors[i], vectors[i + count], (words){__VA_ARGS__} + distance);
    words distance = {0};
    distance = distance + 8;
    ROUND(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
    distance = distance - 4;
    ROUND(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    distance = distance - 2;
    ROUND(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    distance = distance - 1;
    ROUND(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#undef ROUND
    return vectors[0];
}

/* e to the power of x, for x up to 0, to about 2 units in the last place: 2 to the whole part of x / ln 2, times a
 * Taylor polynomial of degree six in the remainder. libm's function does not vectorise. */
INLINE float exponential(float x)
{
    int is_nothing = x < -87.0f;
    x = is_nothing ? -87.0f : x;
    float whole = x * 1.44269504f + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &whole, sizeof bits);
    whole -= 12582912.0f;
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    /* The whole number is in the low bits of the sum that rounded it. */
    int32_t power = (bits - 0x4b400000 + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return is_nothing ? 0.0f : sum * scale;
}

/* hidden += added, unless added is null; normed = hidden / its root mean square * weight. All (rows, size). */
INLINE void add_norm(void *hidden, const void *added, const void *weight, void *normed, int64_t rows, int64_t size,
                     float eps, int half)
{
#pragma omp parallel for if (rows * size > MANY / 4)
    for (int64_t row = 0; row < rows; row++) {
        int64_t first = row * size;
        float sum = 0;
        if (added)
            for (int64_t i = first; i < first + size; i++)
                put(hidden, i, get(hidden, i, half) + get(added, i, half), half);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < first + size; i++) {
            float value = get(hidden, i, half);
            sum += value * value;
        }
        float scale = 1 / sqrtf(sum / (float)size + eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            put(normed, first + i, get(hidden, first + i, half) * scale * get(weight, i, half), half);
    }
}

/* Rotate the first `heads` heads of each row of `projected` (rows, all_heads, dim) in place by the row's position.
 * `cosine` and `sine` are (positions, dim); the sine is negated for the first half of a head. */
INLINE void rotate(void *projected, const void *cosine, const void *sine, const int64_t *positions, int64_t rows,
                   int64_t heads, int64_t all_heads, int64_t dim, int half)
{
    int64_t middle = dim / 2;
#pragma omp parallel for if (rows * heads * dim > MANY / 4)
    for (int64_t row = 0; row < rows; row++) {
        int64_t turn = positions[row] * dim;
        for (int64_t head = 0; head < heads; head++) {
            int64_t low = (row * all_heads + head) * dim, high = low + middle;
#pragma omp simd
            for (int64_t i = 0; i < middle; i++) {
                float left = get(projected, low + i, half), right = get(projected, high + i, half);
                put(projected, low + i, left * get(cosine, turn + i, half) + right * get(sine, turn + i, half), half);
                put(projected, high + i,
                    right * get(cosine, turn + middle + i, half) + left * get(sine, turn + middle + i, half), half);
            }
        }
    }
}

/* out (rows, size) = SiLU of the first half of both (rows, 2 * size), times the second. */
INLINE void gate(const void *both, void *out, int64_t rows, int64_t size, int half)
{
#pragma omp parallel for if (rows * size > MANY / 16)
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float value = get(both, 2 * row * size + i, half);
            float positive = value < 0 ? -value : value, small = exponential(-positive);
            float sigmoid = (value < 0 ? small : 1.0f) / (1.0f + small);
            put(out, row * size + i, value * sigmoid * get(both, (2 * row + 1) * size + i, half), half);
        }
}

/* Copy keys or values (rows, heads, dim), a row every `stride`, to their slots of a cache. */
INLINE void store(const void *from, int64_t stride, void *cache, int64_t slot_stride, int64_t head_stride,
                  const int64_t *slots, int64_t rows, int64_t heads, int64_t dim, int half)
{
    int64_t width = half ? 2 : 4;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            memcpy((char *)cache + (slots[row] * slot_stride + head * head_stride) * width,
                   (const char *)from + (row * stride + head * dim) * width, (size_t)(dim * width));
}

/* Attention of the `group` query heads of one row that read the same keys: softmax in one pass, as in FlashAttention,
 * over tokens from `begin` to `end`, in contiguous tiles. `dim` is a multiple of LANES. */
INLINE void see(const void *query, const void *keys, const void *values, int64_t slot_stride, const int32_t *blocks,
                int64_t block_size, int64_t begin, int64_t end, void *out, int64_t group, int64_t dim, float scale,
                int half)
{
    lanes asked[MAX_GROUP * MAX_DIM / LANES], seen[MAX_GROUP * MAX_DIM / LANES];
    float weights[MAX_GROUP][TILE], highest[MAX_GROUP], total[MAX_GROUP];
    int64_t parts = dim / LANES;
    for (int64_t i = 0; i < group * parts; i++) {
        asked[i] = load(query, i * LANES, half) * scale;
        seen[i] = (lanes){0};
    }
    for (int64_t head = 0; head < group; head++) {
        highest[head] = -INFINITY;
        total[head] = 0;
    }
    while (begin < end) {
        int64_t block = begin / block_size, first = blocks[block] * block_size + begin % block_size;
        int64_t stop = (block + 1) * block_size;
        while (stop < end && stop - begin < TILE && blocks[stop / block_size] == blocks[stop / block_size - 1] + 1)
            stop += block_size;
        stop = stop < end ? stop : end;
        int64_t count = stop - begin < TILE ? stop - begin : TILE;
        for (int64_t token = 0; token < count; token += LANES) {
            lanes scores[MAX_GROUP][LANES];
            for (int64_t i = 0; i < LANES; i++) {
                /* Past the end, the last token is read again and not used. */
                int64_t at = (first + (token + i < count ? token + i : count - 1)) * slot_stride;
                lanes key[MAX_DIM / LANES];
                for (int64_t part = 0; part < parts; part++)
                    key[part] = load(keys, at + part * LANES, half);
                for (int64_t head = 0; head < group; head++) {
                    lanes sum = {0};
                    for (int64_t part = 0; part < parts; part++)
                        sum += asked[head * parts + part] * key[part];
                    scores[head][i] = sum;
                }
            }
            for (int64_t head = 0; head < group; head++) {
                lanes sums = add_up(scores[head]);
                memcpy(&weights[head][token], &sums, sizeof sums);
            }
        }
        for (int64_t head = 0; head < group; head++) {
            float top = highest[head], sum = 0;
            for (int64_t token = 0; token < count; token++)
                top = weights[head][token] > top ? weights[head][token] : top;
            /* 0 for the first tile. */
            float before = exponential(highest[head] - top);
            highest[head] = top;
#pragma omp simd reduction(+ : sum)
            for (int64_t token = 0; token < count; token++) {
                weights[head][token] = exponential(weights[head][token] - top);
                sum += weights[head][token];
            }
            total[head] = total[head] * before + sum;
            for (int64_t part = 0; part < parts; part++)
                seen[head * parts + part] *= before;
        }
        for (int64_t token = 0; token < count; token++)
            for (int64_t part = 0; part < parts; part++) {
                lanes value = load(values, (first + token) * slot_stride + part * LANES, half);
                for (int64_t head = 0; head < group; head++)
                    seen[head * parts + part] += weights[head][token] * value;
            }
        begin += count;
    }
    for (int64_t head = 0; head < group; head++)
        for (int64_t i = 0; i < dim; i++)
            put(out, head * dim + i, seen[head * parts + i / LANES][i % LANES] / total[head], half);
}

/* Attention of one token of each of `rows` requests to the last `window` of its `lengths` tokens, whose blocks are a
 * line of `table` (rows, width); query and out (rows, heads * group, dim), a query's row every `stride`. */
INLINE void attend(const void *query, int64_t stride, const void *keys, const void *values, int64_t slot_stride,
                   int64_t head_stride, const int32_t *table, int64_t width, const int64_t *lengths, void *out,
                   int64_t rows, int64_t heads, int64_t group, int64_t dim, int64_t block_size, int64_t window,
                   float scale, int half)
{
    int64_t work = 0, bytes = half ? 2 : 4;
    for (int64_t row = 0; row < rows; row++)
        work += (lengths[row] < window ? lengths[row] : window) * heads * group * dim * 2;
#pragma omp parallel for collapse(2) schedule(dynamic) if (work > MANY)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t begin = lengths[row] < window ? 0 : lengths[row] - window;
            const char *key = (const char *)keys + head * head_stride * bytes;
            const char *value = (const char *)values + head * head_stride * bytes;
            for (int64_t first = 0; first < group; first += MAX_GROUP) {
                int64_t together = group - first < MAX_GROUP ? group - first : MAX_GROUP;
                const char *own = (const char *)query + (row * stride + (head * group + first) * dim) * bytes;
                char *to = (char *)out + ((row * heads + head) * group + first) * dim * bytes;
                /* With constant sizes, the compiler unrolls the loops. */
#define SEE(known_together, known_dim)                                                                                 \
    see(own, key, value, slot_stride, table + row * width, block_size, begin, lengths[row], to, known_together,        \
        known_dim, scale, half)
                if (dim == 64 && together == 1)
                    SEE(1, 64);
                else if (dim == 64 && together == 4)
                    SEE(4, 64);
                else if (dim == 64)
                    SEE(together, 64);
                else if (dim == 128 && together == 1)
                    SEE(1, 128);
                else if (dim == 128 && together == 4)
                    SEE(4, 128);
                else if (dim == 128)
                    SEE(together, 128);
                else
                    SEE(together, dim);
            }
        }
}

#define BOTH(name, parameters, arguments)                                                                              \
    void name##_float32 parameters                                                                                     \
    {                                                                                                                  \
        name(arguments, 0);                                                                                            \
    }                                                                                                                  \
    void name##_bfloat16 parameters                                                                                    \
    {                                                                                                                  \
        name(arguments, 1);                                                                                            \
    }
#define LIST(...) __VA_ARGS__

BOTH(add_norm,
     (void *hidden, const void *added, const void *weight, void *normed, int64_t rows, int64_t size, float eps),
     LIST(hidden, added, weight, normed, rows, size, eps))
BOTH(rotate,
     (void *projected, const void *cosine, const void *sine, const int64_t *positions, int64_t rows, int64_t heads,
      int64_t all_heads, int64_t dim),
     LIST(projected, cosine, sine, positions, rows, heads, all_heads, dim))
BOTH(gate, (const void *both, void *out, int64_t rows, int64_t size), LIST(both, out, rows, size))
BOTH(store,
     (const void *from, int64_t stride, void *cache, int64_t slot_stride, int64_t head_stride, const int64_t *slots,
      int64_t rows, int64_t heads, int64_t dim),
     LIST(from, stride, cache, slot_stride, head_stride, slots, rows, heads, dim))
BOTH(attend,
     (const void *query, int64_t stride, const void *keys, const void *values, int64_t slot_stride,
      int64_t head_stride, const int32_t *table, int64_t width, const int64_t *lengths, void *out, int64_t rows,
      int64_t heads, int64_t group, int64_t dim, int64_t block_size, int64_t window, float scale),
     LIST(query, stride, keys, values, slot_stride, head_stride, table, width, lengths, out, rows, heads, group, dim,
          block_size, window, scale))
