// What `moeca::branches_` does on a CPU: choose, gather, multiply, forecast and keep. Called through ctypes from
// native_branches.py, which says what each function takes. B samples of N tokens, K branches a token, D channels,
// E experts, R computed branches. Plain C++17: no header of torch, so that it compiles in seconds.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
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

// The slot that holds each routed branch, or -1. Ids that a router gives twice are told apart by their number. Without
// a jump that depends on data: such jumps are guessed wrong, and cost more than all comparisons.
inline void match(const Index* ids, const Index* held, Index K, int* slot) {
  for (Index k = 0; k < K; ++k) {
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

// Orders as the rank does, NaN first, and equal ranks by their position: one number is faster to compare than two.
inline uint64_t key(float rank, Index position) {
  uint32_t bits;
  std::memcpy(&bits, &rank, 4);
  bits = std::isnan(rank) ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
  return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(position));
}
inline Index position(uint64_t key) { return 0xffffffffu - uint32_t(key); }

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
// branch was computed; else the drift then, to which the scores' change since the last step is added.
extern "C" void choose(
    const Index* ids, const float* gates, const Index* held, const float* due, const float* at, const float* scores,
    const float* seen, const float* sensitivity, const float* threshold, const Index* quota, float now, Index order,
    Index B, Index N, Index K, Index E, Index count, Index* positions, int threads) {
#pragma omp parallel for num_threads(threads)
  for (Index b = 0; b < B; ++b) {
    const Index size = N * K;
    std::vector<float> rank(size), total(threshold ? E : 0), found(threshold ? E : 0);
    std::vector<int> slot(size);
    std::vector<float> due_now(size);
    for (Index n = 0; n < N; ++n) {
      const Index token = b * N + n, first = token * K;
      match(ids + first, held + first, K, &slot[n * K]);
      const float moved = scores ? l1(scores + token * E, seen + token * E, E) : 0.0f;
      for (Index k = 0; k < K; ++k) {
        const Index i = n * K + k, id = ids[first + k];
        float weight = std::fabs(gates[first + k]);
        if (sensitivity) weight *= sensitivity[id];
        if (slot[i] >= 0) {
          const Index j = first + slot[i];
          const float age = scores ? 0.0f : now - at[j];
          due_now[i] = scores ? due[j] + moved : due[j] * (order == 0 ? age : age * age);
          weight *= due_now[i];
          if (threshold) total[id] += due_now[i], found[id] += 1;
        }
        rank[i] = (slot[i] >= 0 ? 0.0f : 4.0f) + weight / (1 + weight);
      }
    }
    if (threshold)
      for (Index i = 0; i < size; ++i) {
        const Index id = ids[b * size + i];
        if (slot[i] >= 0 && total[id] / found[id] >= threshold[id]) rank[i] += 2.0f;
      }
    std::vector<uint64_t> keys(size);
    for (Index i = 0; i < size; ++i) keys[i] = key(rank[i], i);
    if (quota) {
      std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());
      std::vector<Index> taken(E);
      for (uint64_t& one : keys) {
        const Index i = position(one), id = ids[b * size + i];
        if (++taken[id] > quota[id]) one = key(rank[i] - 6.0f, i);
      }
    }
    std::nth_element(keys.begin(), keys.begin() + std::min(count, size - 1), keys.end(), std::greater<uint64_t>());
    for (Index c = 0; c < count; ++c) positions[b * count + c] = position(keys[c]);
  }
}

// Rows of `x` for the chosen branches, one expert's after the other's. `counts` [E]; `place` [R] says where each went.
// Returns an id outside [0, E), or -1.
template <typename T>
Index gather(
    const T* x, const Index* ids, const Index* positions, Index B, Index N, Index K, Index D, Index E, Index count,
    T* rows, Index* counts, Index* place, int threads) {
  const Index R = B * count;
  std::fill(counts, counts + E, 0);
  auto id_of = [&](Index r) { return ids[r / count * N * K + positions[r]]; };
  for (Index r = 0; r < R; ++r) {
    const Index id = id_of(r);
    if (id < 0 || id >= E) return id;
    ++counts[id];
  }
  std::vector<Index> next(E);
  for (Index e = 1; e < E; ++e) next[e] = next[e - 1] + counts[e - 1];
  for (Index r = 0; r < R; ++r) place[r] = next[id_of(r)]++;
#pragma omp parallel for num_threads(threads)
  for (Index r = 0; r < R; ++r)
    std::memcpy(rows + place[r] * D, x + (r / count * N + positions[r] / K) * D, D * sizeof(T));
  return -1;
}

// One token's kept branches.
template <typename T>
struct Slots {
  T* y;
  float *at, *d1, *d2, *before, *gates, *error, *drift;
  Index* held;

  // weight * (branch j at `now`), added to `total` [D]
  void forecast(Index j, Index D, float now, Index order, float weight, float* __restrict total) const {
    const T* __restrict value = y + j * D;
    if (order == 0) {
      for (Index d = 0; d < D; ++d) total[d] += weight * wide(value[d]);
      return;
    }
    const float ahead = now - at[j], once = weight * ahead;
    const float* __restrict first = d1 + j * D;
    if (order == 1) {
      for (Index d = 0; d < D; ++d) total[d] += weight * wide(value[d]) + once * first[d];
      return;
    }
    const float twice = once * (now - before[j]);
    const float* __restrict second = d2 + j * D;
    for (Index d = 0; d < D; ++d) total[d] += weight * wide(value[d]) + once * first[d] + twice * second[d];
  }

  // Put a computed branch into slot j. `same`: the slot holds an older value of it.
  void keep(Index j, bool same, const T* __restrict fresh, Index D, float now, Index order) {
    T* __restrict value = y + j * D;
    float* __restrict first = d1 ? d1 + j * D : nullptr;
    float* __restrict second = d2 ? d2 + j * D : nullptr;
    const float age = now - at[j], older = order == 2 ? now - before[j] : 0.0f;
    const bool two = order == 2 && same && before[j] > 0;
    float off = 0;
    if (!same) {
      for (Index d = 0; error && d < D; ++d) off += std::fabs(wide(fresh[d]));
      std::fill(first, first + (order > 0 ? D : 0), 0.0f);
      std::fill(second, second + (order == 2 ? D : 0), 0.0f);
    } else if (order == 0) {
#pragma omp simd reduction(+ : off)
      for (Index d = 0; d < D; ++d) off += std::fabs(wide(fresh[d]) - wide(value[d]));
    } else {
      const float twice = age * older;
      if (order == 2) {
#pragma omp simd reduction(+ : off)
        for (Index d = 0; d < D; ++d) {
          const float moved = wide(fresh[d]) - wide(value[d]), slope = moved / age, last = first[d];
          off += std::fabs(moved - last * age - second[d] * twice);
          second[d] = two ? (slope - last) / older : 0.0f;
          first[d] = slope;
        }
      } else {
#pragma omp simd reduction(+ : off)
        for (Index d = 0; d < D; ++d) {
          const float moved = wide(fresh[d]) - wide(value[d]);
          off += std::fabs(moved - first[d] * age);
          first[d] = moved / age;
        }
      }
    }
    if (error) error[j] = off / D;
    if (order == 2) before[j] = same ? at[j] : 0.0f;
    std::memcpy(value, fresh, D * sizeof(T));
    at[j] = now;
  }
};

// The weighted sum of every token's branches; what was computed is kept, in place.
// `positions` null: nothing was computed if `keeps` is false, else everything, `fresh` [B, N, K, D] in order.
template <typename T>
void merge(
    const Index* ids, const float* gates, const float* scores, const Index* positions, const Index* place,
    const T* fresh, T* y, float* at, float* d1, float* d2, float* before, Index* held, float* kept, float* error,
    float* drift, float* seen, float now, Index order, bool copy, bool keeps, Index B, Index N, Index K, Index D,
    Index E, Index count, T* out, int threads) {
  const Index forecast_order = copy ? 0 : order;
#pragma omp parallel for num_threads(threads)
  for (Index b = 0; b < B; ++b) {
    std::vector<Index> row(N * K, -1);  // of `fresh`, for what was computed
    for (Index c = 0; positions && c < count; ++c) row[positions[b * count + c]] = place[b * count + c];
    if (!positions && keeps)
      for (Index i = 0; i < N * K; ++i) row[i] = b * N * K + i;
    std::vector<int> slot(K);
    std::vector<char> used(K);
    std::vector<float> total(D);
    for (Index n = 0; n < N; ++n) {
      const Index token = b * N + n, i = token * K;
      const Index* mine = &row[n * K];
      Slots<T> kept_here{
          y + i * D, at + i, d1 ? d1 + i * D : d1, d2 ? d2 + i * D : d2, before ? before + i : before,
          kept + i, error ? error + i : error, drift ? drift + i : drift, held + i};
      match(ids + i, held + i, K, slot.data());
      float present = 0, absent = 0;
      bool any = false;
      std::fill(total.begin(), total.end(), 0.0f);
      for (Index k = 0; k < K; ++k) {
        const float gate = gates[i + k];
        if (slot[k] < 0 && mine[k] < 0) {
          absent += gate;
          continue;
        }
        any = true;
        present += gate;
        if (mine[k] < 0) {
          kept_here.forecast(slot[k], D, now, forecast_order, gate, total.data());
        } else if (out) {
          const T* __restrict value = fresh + mine[k] * D;
          float* __restrict to = total.data();
          for (Index d = 0; d < D; ++d) to[d] += gate * wide(value[d]);
        }
      }
      if (!any)  // the last routed sum stands for them
        for (Index j = 0; j < K; ++j) kept_here.forecast(j, D, now, forecast_order, kept[i + j], total.data());
      const float scale = any && absent != 0 ? 1 + absent / (present == 0 ? 1 : present) : 1;
      if (out)
        for (Index d = 0; d < D; ++d) put(out + token * D + d, total[d] * scale);
      if (!keeps) continue;
      if (drift) {
        const float moved = l1(scores + token * E, seen + token * E, E);
        for (Index j = 0; j < K; ++j) drift[i + j] += moved;
        std::copy(scores + token * E, scores + (token + 1) * E, seen + token * E);
      }
      std::fill(used.begin(), used.end(), 0);
      for (Index k = 0; k < K; ++k)
        if (slot[k] >= 0) used[slot[k]] = 1;
      for (Index k = 0; k < K; ++k) {
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

#define FOR_DTYPE(T, name)                                                                                            \
  extern "C" Index gather_##name(                                                                                     \
      const T* x, const Index* ids, const Index* positions, Index B, Index N, Index K, Index D, Index E, Index count, \
      T* rows, Index* counts, Index* place, int threads) {                                                            \
    return gather<T>(x, ids, positions, B, N, K, D, E, count, rows, counts, place, threads);                          \
  }                                                                                                                   \
  extern "C" void merge_##name(                                                                                       \
      const Index* ids, const float* gates, const float* scores, const Index* positions, const Index* place,          \
      const T* fresh, T* y, float* at, float* d1, float* d2, float* before, Index* held, float* kept, float* error,   \
      float* drift, float* seen, float now, Index order, bool copy, bool keeps, Index B, Index N, Index K, Index D,   \
      Index E, Index count, T* out, int threads) {                                                                    \
    merge<T>(ids, gates, scores, positions, place, fresh, y, at, d1, d2, before, held, kept, error, drift, seen, now, \
             order, copy, keeps, B, N, K, D, E, count, out, threads);                                                 \
  }
FOR_DTYPE(float, float32)
FOR_DTYPE(BFloat16, bfloat16)
