// What `moeca::top_k` does on a CPU: the few largest numbers of each row, for as many rows at a time as a vector has
// lanes, without jumps that depend on data. Compiled together with products.cpp, after it.
namespace {

// `open` [rows]: where equal numbers or NaN leave it open which numbers of a row are the largest, or in which order.
template <int K>
void largest(const float* x, Index rows, Index E, float* values, Index* indices, char* open, int threads) {
#pragma omp parallel for num_threads(threads)
  for (Index first = 0; first < rows; first += LANES) {
    const Index here = std::min(LANES, rows - first);
    Lanes best[K + 1];  // and the largest of the others, which tells whether the choice is clear
    Places at[K + 1] = {}, is_open = {};
    for (int k = 0; k <= K; ++k) best[k] = -std::numeric_limits<float>::infinity() + Lanes{};
    for (Index e = 0; e < E; ++e) {
      float column[LANES];
      for (Index r = 0; r < LANES; ++r) column[r] = x[(first + std::min(r, here - 1)) * E + e];
      Lanes number = load(column);
      Places place = int32_t(e) + Places{};
      is_open |= Places(number != number);
      for (int k = 0; k <= K; ++k) {
        const Places larger = Places(number > best[k]);
        const Lanes last = best[k];
        const Places where = at[k];
        best[k] = larger ? number : last;
        at[k] = larger ? place : where;
        number = larger ? last : number;
        place = larger ? where : place;
      }
    }
    for (int k = 0; k < K; ++k) is_open |= Places(best[k] == best[k + 1]);
    for (Index r = 0; r < here; ++r) {
      for (int k = 0; k < K; ++k) {
        values[(first + r) * K + k] = best[k][r];
        indices[(first + r) * K + k] = at[k][r];
      }
      open[first + r] = is_open[r] != 0;
    }
  }
}

}  // namespace

// The `k` largest numbers of each of the rows [rows, E], the largest first: 1 <= k <= 8, k <= E. The numbers of the rows
// where they aren't clear go into `open`, if it is given. Returns how many rows those are.
extern "C" Index top_k(
    const float* x, Index rows, Index E, Index k, float* values, Index* indices, Index* open, int threads) {
  constexpr decltype(&largest<1>) forms[] = {largest<1>, largest<2>, largest<3>, largest<4>,
                                             largest<5>, largest<6>, largest<7>, largest<8>};
  std::vector<char> is_open(rows);
  forms[k - 1](x, rows, E, values, indices, is_open.data(), threads);
  Index count = 0;
  for (Index r = 0; r < rows; ++r)
    if (is_open[r]) {
      if (open) open[count] = r;
      ++count;
    }
  return count;
}
