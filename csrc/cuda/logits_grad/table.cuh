// V as the gradient kernels read it: a table in the precision of the softmax, each row scaled to magnitude 1.
//
// The scaling keeps V in range: V grows as 1/n, so tiny sample weights would overflow it in fp32.
#pragma once

#include "../rows.cuh"

namespace ldmi::cuda {

using plan::table_pitch;
template <class F>
using Table = plan::GradTable<F>;

// One warp per row of V: its largest magnitude (1 for zeros; NaN goes through the quotients), and the quotients.
template <class F>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2) grad_table(const double* V, int64_t labels, int64_t C, Table<F> table) {
  const int64_t warps = grid_dim() * (kThreads / kWarp);
  for (int64_t k = block_idx() * (kThreads / kWarp) + warp(); k < labels; k += warps) {
    double largest = 0;
    for (int64_t c = lane(); c < C; c += kWarp) largest = fmax(largest, abs(load_const(V + k * C + c)));
    largest = warp_max(largest);
    if (largest == 0) largest = 1;
    const double inverse = 1 / largest;
    for (int64_t c = lane(); c < table.pitch; c += kWarp) {
      store(table.values + k * table.pitch + c, c < C ? static_cast<F>(load_const(V + k * C + c) * inverse) : F{0});
    }
    if (lane() == 0) store(table.magnitude + k, largest);
  }
}

// The two factors of a row's gradient
struct RowFactors {
  double alpha;  // -w scale max|V|
  double gamma;  // w ce_scale
};

// The factors of a row divided by its sum, and the mean of V's row. A column's gradient is e * (a * (V - mean) + g).
template <class F>
struct ColumnFactors {
  F mean, a, g;
  LDMI_DEVICE ColumnFactors(F sum, F product, const RowFactors& row) {
    const double inverse = 1 / static_cast<double>(sum);
    mean = static_cast<F>(static_cast<double>(product) * inverse);
    a = static_cast<F>(row.alpha * inverse);
    g = static_cast<F>(row.gamma * inverse);
  }
  LDMI_DEVICE F operator()(F e, F v) const { return e * fma(a, v - mean, g); }
};

}  // namespace ldmi::cuda
