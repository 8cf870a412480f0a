// What `moeca::branches_` does on a CPU: choose, gather, multiply, forecast and keep. Called through ctypes from
// native_branches.py, which says what each function takes. B samples of N tokens, K branches a token, D channels,
// E experts, R computed branches. Plain C++17: no header of torch, so that it compiles in seconds.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using Index = int64_t;

struct BFloat16 {
  uint16_t bits;
};

inline float wide(float value) { return value; }
inline float wide(BFloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline void put(float* at, float value) { *at = value; }
inline void put(BFloat16* at, float value) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  at->bits = std::isnan(value) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)
constexpr Index LANES = 16;
#else
constexpr Index LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t Places __attribute__((vector_size(LANES * 4)));

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
inline Lanes load(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
  typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof(lanes));
  return lanes;
}
inline void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }
inline void store(BFloat16* to, Lanes lanes) {
  for (Index i = 0; i < LANES; ++i) put(to + i, lanes[i]);
}

// The slot that holds each routed branch, or -1. Ids that a router gives twice are told apart by their number. Without
// a jump that depends on data: such jumps are guessed wrong, and cost more than all comparisons.
template <int COUNT>
inline void match_of(const Index* ids, const Index* held, Index many, int* slot) {
  const Index K = COUNT ? COUNT : many;
  int twice = 0;
  for (Index k = 0; k < K; ++k) {
    int found = -1;
    for (Index j = K - 1; j >= 0; --j) found = held[j] == ids[k] + 1 ? int(j) : found;
    slot[k] = found;
    for (Index other = 0; other < k; ++other) twice |= ids[other] == ids[k];
  }
  for (Index k = 0; twice && k < K; ++k) {
    int before = 0, found = -1;
    for (Index other = 0; other < k; ++other) before += ids[other] == ids[k];
    for (Index j = 0; j < K; ++j) {
      const bool same = held[j] == ids[k] + 1;
      found = same & (before == 0) ? int(j) : found;
      before -= same;
    }
    slot[k] = found;
  }
}
inline void match(const Index* ids, const Index* held, Index K, int* slot) {
  switch (K) {  // loops of a known length have no jumps
    case 1: return match_of<1>(ids, held, K, slot);
    case 2: return match_of<2>(ids, held, K, slot);
    case 4: return match_of<4>(ids, held, K, slot);
    case 6: return match_of<6>(ids, held, K, slot);
    case 8: return match_of<8>(ids, held, K, slot);
    default: return match_of<0>(ids, held, K, slot);
  }
}

// A number that orders as the rank does, NaN last.
inline int32_t ordered(float rank) {
  int32_t bits;
  std::memcpy(&bits, &rank, 4);
  bits ^= bits >> 31 & 0x7fffffff;
  return rank != rank ? std::numeric_limits<int32_t>::max() : bits;
}

// The positions of the `count` largest of `size` keys, ascending; among equal ones the first. The smallest of them is
// searched for bit by bit, without jumps that depend on the keys: sorting takes most of its time for such jumps.
inline void largest_of(const int32_t* keys, Index size, Index count, Index* positions) {
  int64_t low = std::numeric_limits<int32_t>::min();
  Index above = 0;  // how many are larger than `low`
  for (int bit = 31; bit >= 0; --bit) {
    const int32_t middle = int32_t(low + (int64_t(1) << bit));
    int many = 0;
    for (Index i = 0; i < size; ++i) many += keys[i] >= middle;
    if (many >= count) low = middle;
  }
  for (Index i = 0; i < size; ++i) above += keys[i] > low;
  Index equal = count - above;
  for (Index i = 0; i < size; ++i) {
    const bool taken = keys[i] > low || (keys[i] == low && equal > 0);
    equal -= keys[i] == low;
    if (taken) *positions++ = i;
  }
}

inline float l1(const float* a, const float* b, Index E) {
  float total = 0;
  for (Index e = 0; e < E; ++e) {
    float change = std::fabs(a[e] - b[e]);
    if (std::isfinite(change)) total += change;
  }
  return total;
}

}  // namespace

// The `count` positions of each sample with the highest rank. `scores` null: `due` is the error of the forecast when the
// branch was computed; else the drift then, to which the scores' change since the last step is added. Into `slots`, where
// it is given, goes the slot of every routed branch. Hits and transitions take the same instructions: no processor
// guesses which of them a branch is.
extern "C" void choose(
    const Index* ids, const float* gates, const Index* held, const float* due, const float* at, const float* scores,
    const float* seen, const float* sensitivity, const float* threshold, const Index* quota, float now, Index order,
    Index B, Index N, Index K, Index E, Index count, Index* positions, int* slots, int threads) {
#pragma omp parallel for num_threads(threads)
  for (Index b = 0; b < B; ++b) {
    const Index size = N * K, first = b * size;
    std::vector<float> rank(size), weight(size), due_now(size), total(threshold ? E : 0), found(threshold ? E : 0);
    std::vector<int> own(slots ? 0 : size);
    std::vector<int32_t> keys(size);
    int* slot = slots ? slots + first : own.data();
    for (Index n = 0; n < N; ++n) {
      const Index token = b * N + n, here = token * K;
      match(ids + here, held + here, K, slot + n * K);
      const float moved = scores ? l1(scores + token * E, seen + token * E, E) : 0.0f;
      for (Index k = 0; k < K; ++k) {
        const Index i = n * K + k, j = here + std::max(slot[i], 0);
        const float age = now - at[j], last = due[j];
        const float value = scores ? last + moved : last * (order == 0 ? age : age * age);
        due_now[i] = slot[i] < 0 ? 1.0f : value;
      }
    }
    for (Index i = 0; i < size; ++i) weight[i] = std::fabs(gates[first + i]);
    for (Index i = 0; sensitivity && i < size; ++i) weight[i] *= sensitivity[ids[first + i]];
    for (Index i = 0; i < size; ++i) {
      const float weighted = weight[i] * due_now[i];
      rank[i] = (slot[i] < 0 ? 4.0f : 0.0f) + weighted / (1 + weighted);
    }
    if (threshold) {
      for (Index i = 0; i < size; ++i)
        if (slot[i] >= 0) total[ids[first + i]] += due_now[i], found[ids[first + i]] += 1;
      for (Index i = 0; i < size; ++i) {
        const Index id = ids[first + i];
        if (slot[i] >= 0 && total[id] / found[id] >= threshold[id]) rank[i] += 2.0f;
      }
    }
    if (quota) {
      std::vector<Index> best(size), taken(E);
      for (Index i = 0; i < size; ++i) keys[i] = ordered(rank[i]), best[i] = i;
      std::stable_sort(best.begin(), best.end(), [&](Index one, Index other) { return keys[one] > keys[other]; });
      for (Index i : best) {
        const Index id = ids[first + i];
        if (++taken[id] > quota[id]) rank[i] -= 6.0f;
      }
    }
    for (Index i = 0; i < size; ++i) keys[i] = ordered(rank[i]);
    largest_of(keys.data(), size, count, positions + b * count);
  }
}

// Rows of `x` for the chosen branches, one expert's after the other's. `counts` [E]; `place` [R] says where each went.
// Returns an id outside [0, E), or -1.
template <typename T>
Index gather(
    const T* x, const Index* ids, const Index* positions, Index B, Index N, Index K, Index D, Index E, Index count,
    T* rows, Index* counts, Index* place, int threads) {
  std::fill(counts, counts + E, 0);
  auto id_of = [&](Index b, Index c) { return ids[b * N * K + positions[b * count + c]]; };
  for (Index b = 0; b < B; ++b)
    for (Index c = 0; c < count; ++c) {
      const Index id = id_of(b, c);
      if (id < 0 || id >= E) return id;
      ++counts[id];
    }
  std::vector<Index> next(E);
  for (Index e = 1; e < E; ++e) next[e] = next[e - 1] + counts[e - 1];
  for (Index b = 0; b < B; ++b)
    for (Index c = 0; c < count; ++c) place[b * count + c] = next[id_of(b, c)]++;
#pragma omp parallel for num_threads(threads)
  for (Index b = 0; b < B; ++b)
    for (Index c = b * count; c < (b + 1) * count; ++c)
      std::memcpy(rows + place[c] * D, x + (b * N + positions[c] / K) * D, D * sizeof(T));
  return -1;
}

// What one kept branch adds to its token's sum: weight * value + once * first + twice * second, the last two where they
// are. Or one that was computed: weight * fresh.
template <typename T, typename Y, typename D1>
struct Term {
  const T* fresh;
  const Y* value;
  const D1 *first, *second;
  float weight, once, twice;
};

// Channels d to d + V * LANES of a token's sum, which stay in registers.
template <int V, typename T, typename Y, typename D1>
inline void add_up(const Term<T, Y, D1>* terms, Index count, float scale, Index d, T* out) {
  Lanes sums[V] = {};
  for (Index i = 0; i < count; ++i) {
    const Term<T, Y, D1>& term = terms[i];
    if (term.fresh) {
      for (int v = 0; v < V; ++v) sums[v] += term.weight * load(term.fresh + d + v * LANES);
      continue;
    }
    for (int v = 0; v < V; ++v) sums[v] += term.weight * load(term.value + d + v * LANES);
    if (term.first)
      for (int v = 0; v < V; ++v) sums[v] += term.once * load(term.first + d + v * LANES);
    if (term.second)
      for (int v = 0; v < V; ++v) sums[v] += term.twice * load(term.second + d + v * LANES);
  }
  for (int v = 0; v < V; ++v) store(out + d + v * LANES, sums[v] * scale);
}

template <typename T, typename Y, typename D1>
inline void add_up(const Term<T, Y, D1>* terms, Index count, float scale, Index D, T* out) {
  Index d = 0;
  for (; d + 12 * LANES <= D; d += 12 * LANES) add_up<12>(terms, count, scale, d, out);
  for (; d + 4 * LANES <= D; d += 4 * LANES) add_up<4>(terms, count, scale, d, out);
  for (; d + LANES <= D; d += LANES) add_up<1>(terms, count, scale, d, out);
  for (; d < D; ++d) {
    float sum = 0;
    for (Index i = 0; i < count; ++i) {
      const Term<T, Y, D1>& term = terms[i];
      sum += term.weight * (term.fresh ? wide(term.fresh[d]) : wide(term.value[d]));
      if (term.first) sum += term.once * wide(term.first[d]);
      if (term.second) sum += term.twice * wide(term.second[d]);
    }
    put(out + d, sum * scale);
  }
}

// Ask for memory that a later token reads. A token's branches are read in the order of its routing, in which no
// processor sees where the reads go on.
constexpr Index AHEAD = 2;  // tokens
template <typename T>
inline void ask_for(const T* from, Index size) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (Index at = 0; from && at < size * Index(sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
}

// One token's kept branches: values Y and differences D1 of branches that are computed as T.
template <typename T, typename Y, typename D1>
struct Slots {
  Y* y;
  D1 *d1, *d2;
  float *at, *before, *gates, *error, *drift;
  Index* held;

  // weight * (branch j at `now`)
  Term<T, Y, D1> forecast(Index j, Index D, float now, Index order, float weight) const {
    const float once = weight * (now - at[j]);
    return {nullptr, y + j * D, order > 0 ? d1 + j * D : nullptr, order > 1 ? d2 + j * D : nullptr,
            weight, once, order > 1 ? once * (now - before[j]) : 0.0f};
  }

  // Put a computed branch into slot j. `same`: the slot holds an older value of it.
  void keep(Index j, bool same, const T* __restrict fresh, Index D, float now, Index order) {
    Y* __restrict value = y + j * D;
    D1* __restrict first = d1 ? d1 + j * D : nullptr;
    D1* __restrict second = d2 ? d2 + j * D : nullptr;
    const float age = now - at[j], older = order == 2 ? now - before[j] : 0.0f;
    const bool two = order == 2 && same && before[j] > 0;
    float off = 0;
    if (!same) {
      for (Index d = 0; error && d < D; ++d) off += std::fabs(wide(fresh[d]));
      std::fill(first, first + (order > 0 ? D : 0), D1{});
      std::fill(second, second + (order == 2 ? D : 0), D1{});
    } else if (order == 0) {
#pragma omp simd reduction(+ : off)
      for (Index d = 0; d < D; ++d) off += std::fabs(wide(fresh[d]) - wide(value[d]));
    } else {
      const float twice = age * older;
      if (order == 2) {
#pragma omp simd reduction(+ : off)
        for (Index d = 0; d < D; ++d) {
          const float moved = wide(fresh[d]) - wide(value[d]), slope = moved / age, last = wide(first[d]);
          off += std::fabs(moved - last * age - wide(second[d]) * twice);
          put(second + d, two ? (slope - last) / older : 0.0f);
          put(first + d, slope);
        }
      } else {
#pragma omp simd reduction(+ : off)
        for (Index d = 0; d < D; ++d) {
          const float moved = wide(fresh[d]) - wide(value[d]);
          off += std::fabs(moved - wide(first[d]) * age);
          put(first + d, moved / age);
        }
      }
    }
    if (error) error[j] = off / D;
    if (order == 2) before[j] = same ? at[j] : 0.0f;
    for (Index d = 0; d < D; ++d) put(value + d, wide(fresh[d]));
    at[j] = now;
  }
};

// The weighted sum of every token's branches; what was computed is kept, in place.
// `positions` null: nothing was computed if `keeps` is false, else everything, `fresh` [B, N, K, D] in order.
// `slots`: as `choose` found them, or null.
template <typename T, typename Y, typename D1>
void merge(
    const Index* ids, const float* gates, const float* scores, const Index* positions, const Index* place,
    const T* fresh, Y* y, float* at, D1* d1, D1* d2, float* before, Index* held, float* kept, float* error,
    float* drift, float* seen, float now, Index order, bool copy, bool keeps, Index B, Index N, Index K, Index D,
    Index E, Index count, const int* slots, T* out, int threads) {
  const Index forecast_order = copy ? 0 : order;
#pragma omp parallel for num_threads(threads)
  for (Index b = 0; b < B; ++b) {
    std::vector<Index> row(N * K, -1);  // of `fresh`, for what was computed
    for (Index c = 0; positions && c < count; ++c) row[positions[b * count + c]] = place[b * count + c];
    if (!positions && keeps)
      for (Index i = 0; i < N * K; ++i) row[i] = b * N * K + i;
    std::vector<int> slot(K);
    std::vector<char> used(K);
    std::vector<Term<T, Y, D1>> terms(K);
    for (Index n = 0; n < N; ++n) {
      const Index token = b * N + n, i = token * K;
      const Index* mine = &row[n * K];
      Slots<T, Y, D1> kept_here{
          y + i * D, d1 ? d1 + i * D : d1, d2 ? d2 + i * D : d2, at + i, before ? before + i : before,
          kept + i, error ? error + i : error, drift ? drift + i : drift, held + i};
      if (n + AHEAD < N) {
        const Index next = (i + AHEAD * K) * D;
        ask_for(y + next, K * D);
        if (forecast_order > 0) ask_for(d1 + next, K * D);
        if (forecast_order > 1) ask_for(d2 + next, K * D);
      }
      if (slots)
        std::copy(slots + i, slots + i + K, slot.begin());
      else
        match(ids + i, held + i, K, slot.data());
      float present = 0, absent = 0;
      bool any = false, computes = false;
      Index summands = 0;
      for (Index k = 0; k < K; ++k) {
        const float gate = gates[i + k];
        if (slot[k] < 0 && mine[k] < 0) {
          absent += gate;
          continue;
        }
        any = true;
        present += gate;
        terms[summands++] = mine[k] < 0 ? kept_here.forecast(slot[k], D, now, forecast_order, gate)
                                        : Term<T, Y, D1>{fresh + mine[k] * D, nullptr, nullptr, nullptr, gate, 0, 0};
        computes |= mine[k] >= 0;
      }
      if (!any)  // the last routed sum stands for them
        for (Index j = 0; j < K; ++j) terms[summands++] = kept_here.forecast(j, D, now, forecast_order, kept[i + j]);
      const float scale = any && absent != 0 ? 1 + absent / (present == 0 ? 1 : present) : 1;
      if (out) add_up(terms.data(), summands, scale, D, out + token * D);
      if (!keeps) continue;
      if (drift) {
        const float moved = l1(scores + token * E, seen + token * E, E);
        for (Index j = 0; j < K; ++j) drift[i + j] += moved;
        std::copy(scores + token * E, scores + (token + 1) * E, seen + token * E);
      }
      if (computes) {
        std::fill(used.begin(), used.end(), 0);
        for (Index k = 0; k < K; ++k)
          if (slot[k] >= 0) used[slot[k]] = 1;
      }
      for (Index k = 0; computes && k < K; ++k) {
        const bool same = slot[k] >= 0;
        if (!same && mine[k] < 0) continue;
        if (!same) {  // a computed transition takes the free slot with the lowest last gate
          int free = -1;
          for (int j = 0; j < K; ++j)
            if (!used[j] && (free < 0 || kept[i + j] < kept[i + free])) free = j;
          used[slot[k] = free] = 1;
        }
        if (mine[k] < 0) continue;
        kept_here.keep(slot[k], same, fresh + mine[k] * D, D, now, order);
        held[i + slot[k]] = ids[i + k] + 1;
        if (drift) drift[i + slot[k]] = 0;
      }
      for (Index k = 0; k < K; ++k)  // only now: transitions compared the last gates
        if (slot[k] >= 0) kept[i + slot[k]] = gates[i + k];
    }
  }
}

#define GATHER(T, name)                                                                                               \
  extern "C" Index gather_##name(                                                                                     \
      const T* x, const Index* ids, const Index* positions, Index B, Index N, Index K, Index D, Index E, Index count, \
      T* rows, Index* counts, Index* place, int threads) {                                                            \
    return gather<T>(x, ids, positions, B, N, K, D, E, count, rows, counts, place, threads);                          \
  }
GATHER(float, float32)
GATHER(BFloat16, bfloat16)

// By the dtypes of what is computed, and of the kept values and differences.
#define MERGE(T, Y, D1, name)                                                                                         \
  extern "C" void merge_##name(                                                                                       \
      const Index* ids, const float* gates, const float* scores, const Index* positions, const Index* place,          \
      const T* fresh, Y* y, float* at, D1* d1, D1* d2, float* before, Index* held, float* kept, float* error,         \
      float* drift, float* seen, float now, Index order, bool copy, bool keeps, Index B, Index N, Index K, Index D,   \
      Index E, Index count, T* out, int threads) {                                                                    \
    merge<T, Y, D1>(                                                                                                  \
        ids, gates, scores, positions, place, fresh, y, at, d1, d2, before, held, kept, error, drift, seen, now,      \
        order, copy, keeps, B, N, K, D, E, count, nullptr, out, threads);                                             \
  }
MERGE(float, float, float, float32)
MERGE(BFloat16, BFloat16, float, bfloat16)
MERGE(float, BFloat16, BFloat16, float32_narrow)
MERGE(BFloat16, BFloat16, BFloat16, bfloat16_narrow)
