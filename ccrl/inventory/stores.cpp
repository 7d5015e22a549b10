/* Stores alone under a perceptron, all periods of a block of scenarios at a time, forward and backward.
 *
 * stores.py says what is computed. A vector holds one number of every scenario of a block of LANES, and a block goes through
 * the whole horizon while its numbers are in the cache. Compiled by ccrl/native.py with REAL float or double; vector
 * extensions of GCC and Clang, no intrinsics. */
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
typedef REAL real;
typedef real vec __attribute__((vector_size(BYTES)));
enum : int { LANES = BYTES / sizeof(real), TILE = 8, HIGH = 4, WIDE = BYTES / 16 };

typedef struct {
    int64_t scenarios, periods, stores, slots, layers, lost;
    const int64_t *sizes; /* [layers + 1] inputs, hidden layers, outputs = stores */
    const int64_t *used;  /* [inputs] places in [stores * slots] that the first layer reads */
    const int64_t *lead;  /* [stores] lead times */
    const real *weights;  /* per layer the matrix [out, in], then the bias [out] */
    const real *holding, *underage; /* [stores] */
    const real *stock;    /* [scenarios, stores * slots] before the first period */
    const real *demand;   /* [periods, scenarios, stores] */
} problem;

extern "C" int64_t lanes(void) { return LANES; }

static inline vec each(real x) { return vec{} + x; }

/* exp of at most 0; below -87, e^-87. NaN stays NaN, here and in all that follows: eager training stops at it */
static inline vec exponential(vec x) {
    vec out;
    if (sizeof(real) == 4) {
        typedef int32_t ints __attribute__((vector_size(BYTES)));
        const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits */
        x = x < each(-87.0) ? each(-87.0) : x;
        vec shifted = x * (real)1.44269504f + (real)magic;
        vec n = shifted - (real)magic;
        vec r = x - n * (real)0.693145752f;
        r = r - n * (real)1.42860677e-6f;
        vec p = each(1.0 / 5040);
        p = p * r + (real)(1.0 / 720);
        p = p * r + (real)(1.0 / 120);
        p = p * r + (real)(1.0 / 24);
        p = p * r + (real)(1.0 / 6);
        p = p * r + (real)0.5;
        p = p * r + (real)1;
        p = p * r + (real)1;
        ints power = ((ints)shifted - 0x4B400000 + 127) << 23;
        std::memcpy(&out, &power, sizeof out);
        return out * p;
    }
    for (int i = 0; i < LANES; i++) out[i] = std::exp(x[i]);
    return out;
}

/* log(1 + x) of 0 to 1, as 2 artanh(x / (2 + x)) */
static inline vec log_of_one_and(vec x) {
    if (sizeof(real) == 4) {
        const vec w = x / ((real)2 + x), square = w * w;
        vec p = each(2.0 / 13);
        for (int n = 11; n > 0; n -= 2) p = p * square + (real)(2.0 / n);
        return w * p;
    }
    for (int i = 0; i < LANES; i++) x[i] = std::log1p(x[i]);
    return x;
}

static inline vec elu(vec x) {
    vec below = x > each(0) ? each(0) : x;
    return x > each(0) ? x : exponential(below) - (real)1;
}

/* y[r] = start[r] + sum_c matrix[r * down + c * across] x[c]; a tile of rows keeps as many sums in registers */
static inline void product(vec *__restrict y, const real *__restrict matrix, int64_t rows, int64_t columns, int64_t down,
                           int64_t across, const real *start, const vec *__restrict x) {
    int64_t r = 0;
    for (; r + TILE <= rows; r += TILE) {
        vec sum[TILE];
        for (int i = 0; i < TILE; i++) sum[i] = start ? each(start[r + i]) : each(0);
        for (int64_t c = 0; c < columns; c++)
            for (int i = 0; i < TILE; i++) sum[i] += matrix[(r + i) * down + c * across] * x[c];
        for (int i = 0; i < TILE; i++) y[r + i] = sum[i];
    }
    for (; r < rows; r++) {
        vec sum = start ? each(start[r]) : each(0);
        for (int64_t c = 0; c < columns; c++) sum += matrix[r * down + c * across] * x[c];
        y[r] = sum;
    }
}

/* gradient[o][i] += sum_t delta[t][o] input[t][i], lanes apart */
static inline void outer(vec *__restrict gradient, int64_t outs, int64_t ins, const vec *__restrict delta, int64_t delta_row,
                         const vec *__restrict input, int64_t input_row, int64_t periods) {
    int64_t o = 0;
    for (; o + HIGH <= outs; o += HIGH) {
        int64_t i = 0;
        for (; i + WIDE <= ins; i += WIDE) {
            vec sum[HIGH][WIDE];
            for (int a = 0; a < HIGH; a++)
                for (int b = 0; b < WIDE; b++) sum[a][b] = gradient[(o + a) * ins + i + b];
            for (int64_t t = 0; t < periods; t++)
                for (int a = 0; a < HIGH; a++)
                    for (int b = 0; b < WIDE; b++)
                        sum[a][b] += delta[t * delta_row + o + a] * input[t * input_row + i + b];
            for (int a = 0; a < HIGH; a++)
                for (int b = 0; b < WIDE; b++) gradient[(o + a) * ins + i + b] = sum[a][b];
        }
        for (; i < ins; i++)
            for (int a = 0; a < HIGH; a++) {
                vec sum = gradient[(o + a) * ins + i];
                for (int64_t t = 0; t < periods; t++) sum += delta[t * delta_row + o + a] * input[t * input_row + i];
                gradient[(o + a) * ins + i] = sum;
            }
    }
    for (; o < outs; o++)
        for (int64_t i = 0; i < ins; i++) {
            vec sum = gradient[o * ins + i];
            for (int64_t t = 0; t < periods; t++) sum += delta[t * delta_row + o] * input[t * input_row + i];
            gradient[o * ins + i] = sum;
        }
}

/* rows of `stride` numbers, one lane each; lanes beyond the last scenario are 0 */
static inline vec gather(const real *from, int64_t stride, int64_t count) {
    vec out = each(0);
    if (stride == 1 && count == LANES) {
        std::memcpy(&out, from, sizeof out);
        return out;
    }
    for (int64_t i = 0; i < count; i++) out[i] = from[i * stride];
    return out;
}

static int64_t width(const problem *p) { /* vectors kept of one period: stock, hidden layers, slope of the orders */
    int64_t n = p->stores * p->slots + p->stores;
    for (int64_t l = 1; l < p->layers; l++) n += p->sizes[l];
    return n;
}

extern "C" int64_t kept(const problem *p) { return width(p) * p->periods * LANES; }

static int64_t longest(const problem *p) {
    int64_t n = 0;
    for (int64_t l = 0; l <= p->layers; l++) n = p->sizes[l] > n ? p->sizes[l] : n;
    return n;
}

static int64_t count_of(const problem *p, int64_t block) {
    int64_t left = p->scenarios - block * LANES;
    return left < LANES ? left : LANES;
}

/* Blocks first..last-1. keep: [blocks, kept()], aligned; cost: [periods, scenarios]. */
extern "C" void forward(const problem *p, int64_t first, int64_t last, real *keep, real *cost) {
    const int64_t nodes = p->stores, slots = p->slots, row = width(p);
    for (int64_t block = first; block < last; block++) {
        const int64_t count = count_of(p, block), begin = block * LANES;
        vec *here = (vec *)(keep + block * kept(p));
        vec input[p->sizes[0]], order[nodes];
        for (int64_t j = 0; j < nodes * slots; j++)
            here[j] = gather(p->stock + begin * nodes * slots + j, nodes * slots, count);
        for (int64_t t = 0; t < p->periods; t++, here += row) {
            const real *matrix = p->weights;
            vec *layer = here + nodes * slots, *slope = here + row - nodes, *next = here + row;
            for (int64_t i = 0; i < p->sizes[0]; i++) input[i] = here[p->used[i]];
            const vec *x = input;
            for (int64_t l = 0; l < p->layers; l++) {
                const int64_t ins = p->sizes[l], outs = p->sizes[l + 1];
                vec *y = l + 1 < p->layers ? layer : order;
                product(y, matrix, outs, ins, ins, 1, matrix + outs * ins, x);
                matrix += outs * (ins + 1);
                if (l + 1 == p->layers) break;
                for (int64_t i = 0; i < outs; i++) y[i] = elu(y[i]);
                x = y;
                layer += outs;
            }
            vec total = each(0);
            for (int64_t k = 0; k < nodes; k++) {
                const vec *own = here + k * slots;
                const vec z = order[k] + (real)1, small = exponential(z > each(0) ? -z : z);
                order[k] = (z > each(0) ? z : each(0)) + log_of_one_and(small); /* softplus(z) */
                slope[k] = (z > each(0) ? each(1) : small) / ((real)1 + small);
                vec post = own[0] - gather(p->demand + (t * p->scenarios + begin) * nodes + k, nodes, count);
                vec left = post > each(0) ? post : each(0), missed = left - post;
                total += p->underage[k] * missed + p->holding[k] * left;
                if (t + 1 == p->periods) continue;
                vec *after = next + k * slots;
                for (int64_t j = 0; j + 1 < slots; j++) after[j] = own[j + 1];
                after[slots - 1] = each(0);
                after[0] += p->lost ? left : post;
                after[p->lead[k] - 1] += order[k];
            }
            for (int64_t i = 0; i < count; i++) cost[t * p->scenarios + begin + i] = total[i];
        }
    }
}

/* numbers of scratch that backward needs */
extern "C" int64_t room(const problem *p) { return kept(p) + (2 * longest(p) + 2 * p->stores * p->slots) * LANES; }

/* towards: [periods, scenarios], the derivative of the loss by `cost`; gradient: [parameters, LANES], added to. */
extern "C" void backward(const problem *p, int64_t first, int64_t last, const real *keep, const real *towards, real *gradient,
              real *work) {
    const int64_t nodes = p->stores, slots = p->slots, row = width(p), hidden = row - nodes - nodes * slots;
    const int64_t deltas = hidden + nodes; /* of one period: those of the hidden layers, then of the outputs */
    vec *delta = (vec *)work, *behind = delta + row * p->periods, *input = behind + longest(p);
    vec *to_next = input + longest(p), *to_stock = to_next + nodes * slots;
    int64_t total = 0; /* parameters before the last layer's */
    for (int64_t l = 0; l + 1 < p->layers; l++) total += p->sizes[l + 1] * (p->sizes[l] + 1);
    for (int64_t block = first; block < last; block++) {
        const int64_t count = count_of(p, block), begin = block * LANES;
        const vec *kept_here = (const vec *)(keep + block * kept(p));
        for (int64_t j = 0; j < nodes * slots; j++) to_next[j] = each(0);
        for (int64_t t = p->periods - 1; t >= 0; t--) {
            const vec *here = kept_here + t * row, *slope = here + row - nodes;
            vec *own = delta + t * deltas, *out = own + hidden;
            vec weight = gather(towards + t * p->scenarios + begin, 1, count);
            for (int64_t k = 0; k < nodes; k++) {
                vec post = here[k * slots] - gather(p->demand + (t * p->scenarios + begin) * nodes + k, nodes, count);
                vec carried = to_next[k * slots];
                if (p->lost) carried = post >= each(0) ? carried : each(0);
                vec held = post >= each(0) ? each(p->holding[k]) : each(0);
                vec missed = post <= each(0) ? each(p->underage[k]) : each(0);
                to_stock[k * slots] = carried + weight * (held - missed);
                for (int64_t j = 1; j < slots; j++) to_stock[k * slots + j] = to_next[k * slots + j - 1];
                out[k] = to_next[k * slots + p->lead[k] - 1] * slope[k];
            }
            const real *matrix = p->weights + total;
            const vec *layer = slope, *d = out;
            for (int64_t l = p->layers - 1; l >= 0; l--) {
                const int64_t ins = p->sizes[l], outs = p->sizes[l + 1];
                vec *y = l ? own + (layer - here) - nodes * slots - ins : behind;
                product(y, matrix, ins, outs, 1, ins, 0, d);
                if (!l) break;
                layer -= ins;
                for (int64_t i = 0; i < ins; i++)
                    y[i] *= layer[i] > each(0) ? each(1) : layer[i] + (real)1;
                d = y;
                matrix -= ins * (p->sizes[l - 1] + 1);
            }
            for (int64_t i = 0; i < p->sizes[0]; i++) to_stock[p->used[i]] += behind[i];
            std::memcpy(to_next, to_stock, sizeof(vec) * nodes * slots);
        }
        vec *into = (vec *)gradient;
        int64_t at = 0, of = nodes * slots;
        for (int64_t l = 0; l < p->layers; l++) {
            const int64_t ins = p->sizes[l], outs = p->sizes[l + 1];
            if (l)
                outer(into, outs, ins, delta + at, deltas, kept_here + of, row, p->periods);
            else
                for (int64_t i = 0; i < ins; i++) /* the inputs lie apart */
                    for (int64_t o = 0; o < outs; o++) {
                        vec sum = into[o * ins + i];
                        for (int64_t t = 0; t < p->periods; t++)
                            sum += delta[t * deltas + o] * kept_here[t * row + p->used[i]];
                        into[o * ins + i] = sum;
                    }
            into += outs * ins;
            for (int64_t o = 0; o < outs; o++) {
                vec sum = into[o];
                for (int64_t t = 0; t < p->periods; t++) sum += delta[t * deltas + at + o];
                into[o] = sum;
            }
            into += outs;
            at += outs;
            of += l ? ins : 0;
        }
    }
}
