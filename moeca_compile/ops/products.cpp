// The products of `moeca::branches_` on a CPU: each expert's linear map on the few rows that are computed. Compiled
// together with branches.cpp, after it.
namespace {

#if defined(__AVX512F__)
constexpr Index LANES = 16;
#else
constexpr Index LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(LANES * 4)));

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
typedef float Four __attribute__((vector_size(16)));
inline float sum(Lanes lanes) {
  Four parts[LANES / 4];
  std::memcpy(parts, &lanes, sizeof(lanes));
  for (Index i = 1; i < LANES / 4; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// out[r, o] = <rows[r], weight[o]> + bias[o] for `RS` rows and `OS` outputs.
template <int RS, int OS>
inline void tile(const float* rows, const float* weight, const float* bias, Index in, Index outs, float* out) {
  Lanes sums[RS][OS] = {};
  Index d = 0;
  for (; d + LANES <= in; d += LANES) {
    Lanes w[OS];
    for (int o = 0; o < OS; ++o) w[o] = load(weight + o * in + d);
    for (int r = 0; r < RS; ++r) {
      const Lanes x = load(rows + r * in + d);
      for (int o = 0; o < OS; ++o) sums[r][o] += x * w[o];
    }
  }
  for (int r = 0; r < RS; ++r)
    for (int o = 0; o < OS; ++o) {
      float total = sum(sums[r][o]) + (bias ? bias[o] : 0.0f);
      for (Index i = d; i < in; ++i) total += rows[r * in + i] * weight[o * in + i];
      out[r * outs + o] = total;
    }
}

template <int OS>
inline void outputs(const float* rows, Index n, const float* weight, const float* bias, Index in, Index outs, float* out) {
  Index r = 0;
  for (; r + 4 <= n; r += 4) tile<4, OS>(rows + r * in, weight, bias, in, outs, out + r * outs);
  for (; r < n; ++r) tile<1, OS>(rows + r * in, weight, bias, in, outs, out + r * outs);
}

// The same for V * LANES rows, which stand side by side: `columns` [in, V * LANES]. No sum goes across lanes.
template <int V, int OS>
inline void across(const float* columns, const float* weight, const float* bias, Index in, Index outs, float* out) {
  constexpr Index rows = V * LANES;
  Lanes sums[OS][V] = {};
  for (Index d = 0; d < in; ++d) {
    Lanes x[V];
    for (int v = 0; v < V; ++v) x[v] = load(columns + d * rows + v * LANES);
    for (int o = 0; o < OS; ++o)
      for (int v = 0; v < V; ++v) sums[o][v] += x[v] * weight[o * in + d];
  }
  float turned[OS][rows];
  std::memcpy(turned, sums, sizeof(turned));
  for (Index r = 0; r < rows; ++r)
    for (int o = 0; o < OS; ++o) out[r * outs + o] = turned[o][r] + (bias ? bias[o] : 0.0f);
}

// One expert's rows: as many as fill vectors turned into columns, the few others one by one.
class Rows {
 public:
  Rows(const float* rows, Index n, Index in) : rows_(rows), n_(n), in_(in), pairs_(n / (2 * LANES)) {
    turned_ = n / LANES * LANES;
    columns_.resize(turned_ * in);
    for (Index r = 0; r < turned_; r += width(r))
      for (Index d = 0; d < in; ++d)
        for (Index i = 0; i < width(r); ++i) columns_[r * in + d * width(r) + i] = rows[(r + i) * in + d];
  }

  template <int OS>
  void map(const float* weight, const float* bias, Index outs, float* out) const {
    Index r = 0;
    for (; r < pairs_ * 2 * LANES; r += 2 * LANES) across<2, OS>(&columns_[r * in_], weight, bias, in_, outs, out + r * outs);
    for (; r < turned_; r += LANES) across<1, OS>(&columns_[r * in_], weight, bias, in_, outs, out + r * outs);
    constexpr int few = OS % 3 ? 1 : 3;
    for (int o = 0; o < OS && r < n_; o += few)
      outputs<few>(rows_ + r * in_, n_ - r, weight + o * in_, bias ? bias + o : nullptr, in_, outs, out + r * outs + o);
  }

 private:
  Index width(Index r) const { return r < pairs_ * 2 * LANES ? 2 * LANES : LANES; }

  const float* rows_;
  Index n_, in_, pairs_, turned_;
  std::vector<float> columns_;
};

}  // namespace

// Each expert's linear map on its rows: weights E of [outs, in], biases E of [outs] or null.
extern "C" void multiply(
    const float* rows, const Index* counts, const float* const* weights, const float* const* biases, Index E, Index in,
    Index outs, float* out, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (Index e = 0; e < E; ++e) {
    if (!counts[e]) continue;
    Index first = 0;
    for (Index before = 0; before < e; ++before) first += counts[before];
    const Rows mine(rows + first * in, counts[e], in);
    float* result = out + first * outs;
    const float* bias = biases ? biases[e] : nullptr;
    Index o = 0;
    for (; o + 6 <= outs; o += 6)  // a weight is read from memory once, for all rows
      mine.map<6>(weights[e] + o * in, bias ? bias + o : nullptr, outs, result + o);
    for (; o < outs; ++o) mine.map<1>(weights[e] + o * in, bias ? bias + o : nullptr, outs, result + o);
  }
}
