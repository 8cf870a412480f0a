// The experts of `moeca::branches_` on a CPU, for the few rows that are computed. Compiled together with branches.cpp,
// after it. Rows stand side by side, as many as a vector has lanes, so that no sum goes across lanes. A weight is read from memory once for up to 4 * LANES rows.
namespace {

inline Lanes all(float value) { return value + Lanes{}; }

// exp, a few units in the last place off; infinite above 88.4, the least normal number below -87.
inline Lanes exp(Lanes x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 89.0f ? all(89.0f) : x;
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits are the rounded number
  const Lanes whole = shifted - 12582912.0f, rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lanes sum = all(1.9875691500e-4f);
  for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * rest + factor;
  Places power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power - 0x4b400000 + 127) << 23;
  Lanes scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return (sum * rest * rest + rest + 1.0f) * scale;
}
inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exp(-x)); }

// Those of `_ACTIVATIONS` in experts.py that need no more than `exp`, in the order of `ACTIVATIONS` in branches.py.
enum Activation { IDENTITY, SILU, GELU_TANH, QUICK_GELU, RELU, RELU2, SIGMOID };
inline Lanes activated(Lanes x, int activation) {
  switch (activation) {
    case SILU: return x / (1.0f + exp(-x));
    case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case RELU: return x < 0.0f ? all(0) : x;
    case RELU2: return x < 0.0f ? all(0) : x * x;
    case SIGMOID: return sigmoid(x);
    default: return x;
  }
}

// out[o, r] = <columns[:, r], weight[o]> + bias[o] for V * LANES of `rows` rows r and OS outputs o.
template <int V, int OS>
inline void tile(const float* columns, const float* weight, const float* bias, Index in, Index rows, float* out) {
  Lanes sums[OS][V] = {};
  for (Index d = 0; d < in; ++d) {
    Lanes x[V];
    for (int v = 0; v < V; ++v) x[v] = load(columns + d * rows + v * LANES);
    for (int o = 0; o < OS; ++o)
      for (int v = 0; v < V; ++v) sums[o][v] += x[v] * weight[o * in + d];
  }
  for (int o = 0; o < OS; ++o)
    for (int v = 0; v < V; ++v) store(out + o * rows + v * LANES, bias ? sums[o][v] + bias[o] : sums[o][v]);
}

// The same for all outputs and V * LANES rows. Two vectors of rows and six outputs at a time: the sums, the rows and a
// weight fill the registers, and a weight is read from memory once.
template <int V>
inline void linear(const float* columns, const float* weight, const float* bias, Index in, Index outs, float* out) {
  constexpr Index rows = V * LANES, OS = V == 1 ? 8 : 6;
  auto some = [&](Index o, auto two, auto one) {
    const float *from = weight + o * in, *added = bias ? bias + o : bias;
    for (int v = 0; v < V - 1; v += 2) two(columns + v * LANES, from, added, in, rows, out + o * rows + v * LANES);
    if (V % 2) one(columns + (V - 1) * LANES, from, added, in, rows, out + o * rows + (V - 1) * LANES);
  };
  if (outs < OS)
    for (Index o = 0; o < outs; ++o) some(o, tile<2, 1>, tile<1, 1>);
  else
    for (Index o = 0; o < outs; o += OS)  // a few twice: the same numbers
      some(std::min(o, outs - OS), tile<2, OS>, tile<1, OS>);
}

// One expert's weights: `up` [hidden, in], `down` [outs, hidden]; `gate` as `up`, or null; biases may be null.
struct Expert {
  const float *up, *down, *gate, *up_bias, *down_bias, *gate_bias;
};

// The expert of n <= V * LANES rows.
template <int V>
void run(const float* rows, Index n, const Expert& expert, int activation, Index in, Index hidden, Index outs, float* out) {
  constexpr Index width = V * LANES;
  std::vector<float> columns(std::max(in, outs) * width), first(hidden * width), second(expert.gate ? hidden * width : 0);
  for (Index r = 0; r < n; ++r)
    for (Index d = 0; d < in; ++d) columns[d * width + r] = rows[r * in + d];
  linear<V>(columns.data(), expert.up, expert.up_bias, in, hidden, first.data());
  if (expert.gate) linear<V>(columns.data(), expert.gate, expert.gate_bias, in, hidden, second.data());
  for (Index i = 0; i < hidden * width; i += LANES) {
    const Lanes up = load(&first[i]);
    const Lanes product = expert.gate ? activated(load(&second[i]), activation) * up : activated(up, activation);
    std::memcpy(&first[i], &product, sizeof(product));
  }
  linear<V>(first.data(), expert.down, expert.down_bias, hidden, outs, columns.data());
  for (Index r = 0; r < n; ++r)
    for (Index o = 0; o < outs; ++o) out[r * outs + o] = columns[o * width + r];
}

}  // namespace

// Each expert on its rows, `counts` [E] of them, one expert's after the other's. `weights` [6, E]: the members of all
// `Expert`s; `activation` is one of those above.
extern "C" void few_rows(
    const float* rows, const Index* counts, const float* const* weights, Index activation, Index E, Index in, Index hidden,
    Index outs, float* out, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (Index e = 0; e < E; ++e) {
    Index first = 0;
    for (Index before = 0; before < e; ++before) first += counts[before];
    auto one = [&](int group) { return weights[group * E + e]; };
    const Expert expert{one(0), one(1), one(2), one(3), one(4), one(5)};
    for (Index left = counts[e], n; left > 0; left -= n, first += n) {
      n = std::min(left, 4 * LANES);
      constexpr decltype(&run<1>) forms[] = {run<1>, run<2>, run<3>, run<4>};
      forms[(n - 1) / LANES](
          rows + first * in, n, expert, int(activation), in, hidden, outs, out + first * outs);
    }
  }
}

// A whole step of float32 branches: `choose`, `gather`, `few_rows` and `merge`. `narrow`: y, d1 and d2 are kept in bfloat16.
// Returns as `gather` does; -2: there are no weights, as in a table that was made of zeros.
extern "C" Index step(
    const float* x, const Index* ids, const float* gates, const float* scores, const float* sensitivity,
    const float* threshold, const Index* quota, void* y, float* at, void* d1, void* d2, float* before, Index* held,
    float* kept, float* error, float* drift, float* seen, const float* const* weights, float now, Index order, bool copy,
    bool narrow, Index activation, Index B, Index N, Index K, Index E, Index in, Index hidden, Index D, Index count,
    float* out, int threads) {
  if (!weights[0]) return -2;
  const Index R = B * count;
  std::vector<Index> positions(R), place(R), counts(E);
  std::vector<int> slots(B * N * K);
  std::vector<float> rows(R * in), fresh(R * D);
  choose(ids, gates, held, drift ? drift : error, at, scores, seen, sensitivity, threshold, quota, now, order, B, N, K, E,
         count, positions.data(), slots.data(), threads);
  const Index outside =
      gather(x, ids, positions.data(), B, N, K, in, E, count, rows.data(), counts.data(), place.data(), threads);
  if (outside >= 0) return outside;
  few_rows(rows.data(), counts.data(), weights, activation, E, in, hidden, D, fresh.data(), threads);
  auto finish = [&](auto zero) {
    using Y = decltype(zero);
    merge<float, Y, Y>(
        ids, gates, scores, positions.data(), place.data(), fresh.data(), static_cast<Y*>(y), at, static_cast<Y*>(d1),
        static_cast<Y*>(d2), before, held, kept, error, drift, seen, now, order, copy, true, B, N, K, D, E, count,
        slots.data(), out, threads);
  };
  narrow ? finish(BFloat16{}) : finish(0.0f);
  return -1;
}
