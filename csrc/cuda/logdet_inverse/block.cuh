// log|det S| and V = S^{-T} by one block: Gauss-Jordan elimination in place, in fp64, the matrix in shared memory. The functions at
// the end of the file call the elimination by one warp (warp.cuh) for at most 32 classes.
//
// Elimination. R = diag(1/n) S of the classes that are present, with identity rows and columns for the others. Step k divides the row
// of the pivot by the pivot and subtracts multiples of it from every other row. The column that it clears stores column k of the
// inverse from then on: 2 C^3 operations for determinant and inverse. The product of the pivots is the determinant. Without the
// inverse, the columns before the panel are not updated: this is an LU factorisation, whose determinant has the same bits.
//
// Pivoting. Rows are never exchanged; pivot_row[k] records p_k, the row of the pivot of step k.
// 1. Optimistic pass over a panel: the pivot of step k is the diagonal entry, without a search. Its row can be broadcast at once,
//    and a step waits for one reciprocal only. With a class signal this pass nearly always succeeds.
// 2. If a multiplier exceeds 2 in any step of the panel, the panel is done again with partial pivoting: the pivot is the largest entry
//    of column k among the rows that have not been a pivot row.
// With G the result of the elimination in the memory of R, R^{-1}[k, p_l] = G[p_k, l].
// Growth: a step with a multiplier of 2 can make entries at most 3 times larger, with the search 2 times; in practice neither comes
// near. The search compares magnitudes by their exponent and the first 12 bits of their fraction. Together with the row number they
// fit into 32 bits, so one integer maximum finds the pivot and its row.
//
// Panels. The block eliminates panels J of 8 columns. Their effect on the rest is one matrix product: the elimination of the panel
// alone leaves G[:, J] in its place, and then
//
//     M[:, c] <- (M[:, c] with zeros in the rows p_J) + G[:, J] M[p_J, c]          for every column c outside the panel
//
// in 8 x 8 tiles on the tensor cores. All warps update the tiles of the next panel. Then warp 0 eliminates that panel while the other
// warps update the remaining tile columns of 8 columns, one warp per tile column: three barriers per panel. The operations of a tile
// do not depend on the warp that does them, so the bits do not depend on the number of threads.
//
// M is the transpose of R. With panels this matters: M[p_J, c] is multiplied by the explicit inverse of a block, whose condition
// number may be that of the whole matrix. Where the rows of R are nearly equal, as those of a classifier that has hardly learned, M
// M^{-1} - I grows with that condition number (1e5 C 2^-52 of the norms, measured), and M^{-1} M - I does not. The guarantee is for S
// V^T - I = (M^{-1} M - I)^T, up to the scales. The warp works column by column; there both residuals stay below C 2^-52 / 5, and M is
// R.
#pragma once

#include "warp.cuh"

namespace ldmi::cuda {

namespace factor {

// Applies panel k to the columns c0..c0+7 (those below C). The warp updates every `by`-th tile of 8 rows, beginning with tile `from`.
// It calls read() when it has read the entries that other warps will overwrite.
template <int kTiles, class Read>
LDMI_DEVICE void update_tile_column(const FactorSpace& space, int C, int k, int c0, int from, int by, const Read& read) {
  // Row m of the tile is column c0 + order(m). Rows that are 2 columns apart are next to each other: their addresses are 64 bytes
  // apart modulo 128, so they use different banks.
  const int m = lane() / 4, q = lane() % 4;
  const int c = c0 + (m & 1) * 2 + (m >> 1 & 1) + (m & 4);
  double* const column = space.columns + c * space.stride;
  constexpr int kHalves = kFactorPanel / 4;
  double x[kHalves];
  int g[kHalves], row[kHalves];
  LDMI_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    const int step = k + 4 * h + q;
    const bool there = c < C && step < C;
    row[h] = there ? space.pivot_row[step] : -1;
    x[h] = there ? column[row[h]] : 0.0;
    g[h] = (step < C ? step : C - 1) * space.stride;  // times 0 if there is no such step
  }
  read();
  LDMI_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    if (row[h] >= 0 && row[h] / 8 % by == from) column[row[h]] = 0.0;
  }
  sync_warp();
  for (int first = from; 8 * first < C; first += kTiles * by) {  // kTiles in flight together
    M8N8K4::C tile[kTiles];
    double b[kTiles][kHalves];
    LDMI_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int i = 8 * (first + t * by) + 2 * q, own = 8 * (first + t * by) + m;
      LDMI_UNROLL
      for (int h = 0; h < kHalves; ++h) b[t][h] = space.columns[g[h] + (own < C ? own : C - 1)];
      tile[t] = {};
      if (c < C && i < C) tile[t] = shared_load_tile(column + i);
    }
    LDMI_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      tile_update(tile[t], x, b[t]);
      const int i = 8 * (first + t * by) + 2 * q;
      if (c < C && i < C) shared_store_tile(column + i, tile[t]);
    }
  }
  sync_warp();
}

// One warp eliminates the columns k..k+7 (those below C) alone.
template <int kSlots>
LDMI_DEVICE bool eliminate_panel(const FactorSpace& space, int C, int k, double threshold, unsigned& used, Pivots& pivots) {
  const int columns = C - k < kFactorPanel ? C - k : kFactorPanel;
  double a[kSlots][kFactorPanel];
  double* const panel = space.columns + k * space.stride + lane();
  double* const first = panel + (columns - kFactorPanel) * space.stride;
  int turn = 0;
  bool regular = false;
  LDMI_UNROLL_BY(1)
  for (int attempt = 0; attempt < 2 && !regular; ++attempt) {
    // With the diagonal's pivots the rows k, k + 1, ... are the lanes' first: slot s has the rows of s + turn
    turn = attempt == 0 ? k / kWarp : 0;
    const auto rows = [&](int s) { return s + turn < kSlots ? s + turn : s + turn - kSlots; };
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      LDMI_UNROLL
      for (int j = 0; j < kFactorPanel; ++j) {
        a[s][j] = j < columns && lane() + kWarp * rows(s) < C ? panel[j * space.stride + kWarp * rows(s)] : 0.0;
      }
    }
    if (attempt == 0) {
      const unsigned turned = used >> turn | used << (kSlots - turn);
      regular = eliminate_diagonal(a, k % kWarp, columns, threshold, turned, [&](int step, double pivot) {
        pivots.take(k + step, pivot);
        if (lane() == 0) space.pivot_row[k + step] = static_cast<uint8_t>(k + step);
      });
      if (regular && lane() - k % kWarp >= 0 && lane() - k % kWarp < columns) used |= 1u << turn;
    } else {
      regular = eliminate(a, C, columns, threshold, used, [&](int step, int row, double pivot) {
        pivots.take(k + step, pivot);
        if (lane() == 0) space.pivot_row[k + step] = static_cast<uint8_t>(row);
      });
    }
  }
  if (!regular) return false;
  pivots.count(k, columns);
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int at = kWarp * (s + turn < kSlots ? s + turn : s + turn - kSlots);
    LDMI_UNROLL
    for (int j = 0; j < kFactorPanel; ++j) {
      if (j >= kFactorPanel - columns && lane() + at < C) first[j * space.stride + at] = a[s][j];
    }
  }
  return true;
}

// Computes M from S, one warp per row of R, which is a column of M. Returns the screening and norm = ||R||_inf.
template <int kSlots, class Entry, class Weight>
LDMI_DEVICE Screening equilibrate(const FactorSpace& space, int C, bool strict, const Entry& entry, const Weight& weight,
                                  double* norm) {
  const int warps = block_dim() / kWarp;
  const double least = least_weight(C, weight), lift = plan::lift_of(least);
  bool finite = true;
  for (int word = warp(); word * kWarp < C; word += warps) {
    const int i = word * kWarp + lane();
    const double n = i < C ? weight(i) : 0.0;
    finite &= isfinite(n);
    const unsigned bits = ballot(plan::is_present(n, least));
    if (lane() == 0) space.present[word] = bits;
  }
  if (thread_idx() < 2) space.tickets[thread_idx()] = 0;
  if (thread_idx() == 0) space.found[1] = lift;
  sync_block();
  unsigned here = 0;  // one bit per column of R that the lane has
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    if (kWarp * s < C) here |= (space.present[s] >> lane() & 1u) << s;
  }
  double largest = 0.0;
  constexpr int kRows = kSlots <= 2 ? 4 : 2;  // per warp at a time: their loads are in flight together
  for (int i0 = warp(); i0 < C; i0 += kRows * warps) {
    double scale[kRows], values[kRows][kSlots];
    LDMI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = i0 + r * warps;
      const double n = i < C ? weight(i) : 0.0;
      scale[r] = n > 0.0 ? 1.0 / (n * lift) : 0.0;
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        const int j = lane() + kWarp * s;
        values[r][s] = i < C && j < C ? entry(i, j) : 0.0;
      }
    }
    LDMI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = i0 + r * warps;
      const bool row_here = i < C && (space.present[i / kWarp] >> (i % kWarp) & 1u) != 0;
      double sum = 0.0;
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        const int j = lane() + kWarp * s;
        if (i >= C || j >= C) continue;
        finite &= isfinite(values[r][s]);
        const double value = row_here && (here >> s & 1u) != 0 ? values[r][s] * lift * scale[r] : (i == j ? 1.0 : 0.0);
        space.columns[i * space.stride + j] = value;
        sum += abs(value);
      }
      largest = fmax(largest, warp_sum(sum));
    }
  }
  if (lane() == 0) space.parts[warp()] = largest;
  finite = !sync_block_or(!finite);
  for (int w = 0; w < warps; ++w) largest = fmax(largest, space.parts[w]);
  *norm = largest;
  int present = 0;
  for (int word = 0; word * kWarp < C; ++word) present += popcount(space.present[word]);
  return {finite, strict, present, C};
}

template <int kSlots, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant by_block(const FactorSpace& space, int C, bool strict, bool inverse, const Entry& entry, const Weight& weight,
                                 const Emit& emit) {
  const int warps = block_dim() / kWarp;
  double norm = 0.0;
  const Screening seen = equilibrate<kSlots>(space, C, strict, entry, weight, &norm);
  const auto everywhere = [&](double value) {
    for (int at = thread_idx(); inverse && at < C * C; at += block_dim()) emit(at / C, at % C, value);
    sync_block();
  };
  if (!seen.regular()) {
    everywhere(seen.finite ? 0.0 : kNaN);
    return seen.answer();
  }
  Pivots pivots;
  unsigned used = 0;
  const int tile_columns = (C + kFactorPanel - 1) / kFactorPanel;
  bool regular = true;
  // Round `done` applies panel `done`, to the next panel first; round -1 has no panel to apply. Then warp 0 eliminates the next panel.
  for (int done = -1; done < tile_columns && regular; ++done) {
    const int next = done + 1;
    if (done >= 0 && next < tile_columns) {
      update_tile_column<2>(space, C, done * kFactorPanel, next * kFactorPanel, warp(), warps, [] { sync_block(); });
      sync_block();
    }
    int* const tickets = space.tickets + (next & 1);
    // the tile columns after the next panel, then those before this one
    const int rest = done < 0 ? 0 : inverse ? tile_columns - (next < tile_columns ? 2 : 1) : tile_columns - next - 1;
    const auto draw = [&] {
      int ticket = 0;
      if (lane() == 0) ticket = atomic_add(tickets, 1);
      ticket = shfl(ticket, 0);
      if (ticket >= rest) return -1;
      const int tile_column = next + 1 + ticket;
      return tile_column < tile_columns ? tile_column : tile_column - (next < tile_columns ? tile_columns : tile_columns + 1);
    };
    if (thread_idx() == 0) space.tickets[done & 1] = 0;
    if (warp() == 0 && next < tile_columns) {
      regular = eliminate_panel<kSlots>(space, C, next * kFactorPanel, threshold(C, norm), used, pivots);
    }
    for (int tile_column = draw(); tile_column >= 0; tile_column = draw()) {
      update_tile_column<4>(space, C, done * kFactorPanel, tile_column * kFactorPanel, 0, 1, [] { sync_warp(); });
    }
    regular = !sync_block_or(!regular);
  }
  if (!regular) {
    everywhere(0.0);
    return seen.singular();
  }
  const auto here = [&](int i) { return (space.present[i / kWarp] >> (i % kWarp) & 1u) != 0; };
  if (warp() == 0) {
    for (int i = lane(); i < C; i += kWarp) {
      if (here(i)) pivots.product.multiply(weight(i));
    }
    const double log_abs_det = pivots.product.log();
    if (lane() == 0) space.found[0] = log_abs_det;
  }
  // the sign of p, by its inversions
  bool odd = pivots.odd;
  for (int l = warp(); l < C; l += warps) {
    for (int m = lane(); m < l; m += kWarp) odd ^= space.pivot_row[m] > space.pivot_row[l];
  }
  if (inverse) {
    // V[k, p_l] = G[p_k, l] / n[k]. A warp writes 4 rows of V by 8 columns: whole sectors of memory, and no bank conflicts,
    // because columns are offset by 4 banks. For an absent class a scale of 0 is enough: its row and column of M are those of the
    // identity, where the elimination leaves zeros, and its pivot is its own diagonal entry.
    constexpr int kDown = 4, kAcross = kWarp / kDown, kAhead = 4;
    const double lift = space.found[1];
    for (int k0 = kDown * warp(); k0 < C; k0 += kDown * warps) {
      const int k = k0 + lane() % kDown;
      if (k >= C) continue;
      const double scale = here(k) ? 1.0 / (weight(k) * lift) : 0.0;
      const double* const from = space.columns + space.pivot_row[k];
      for (int l0 = lane() / kDown; l0 < C; l0 += kAhead * kAcross) {
        double value[kAhead];
        int column[kAhead];
        LDMI_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          const int l = l0 + u * kAcross < C ? l0 + u * kAcross : C - 1;
          value[u] = from[l * space.stride];
          column[u] = space.pivot_row[l];
        }
        LDMI_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          if (l0 + u * kAcross < C) emit(k, column[u], value[u] * lift * scale);
        }
      }
    }
  }
  const bool negative = sync_block_count(odd) % 2 != 0;
  return {space.found[0], negative ? -1.0 : 1.0, seen.kept()};
}

}  // namespace factor

// One matrix, C <= kMost. The result is in all threads that call it:
//
//     logdet_inverse_warp<kMost>   all lanes of a warp, C <= kFactorWarp
//     logdet_inverse<kMost>        all threads of a block, C <= kFactorClasses, with take_factor_space(carve, C, stride)
//
// entry(i, j) is S[i, j] and weight(i) is n[i], from memory that the whole warp (block) can read. With `inverse`,
// emit(i, j, value) is called once for every entry of V, by any thread; the threads of a warp write whole sectors of V's rows. The
// values are zeros or NaN where that is the result. emit may overwrite S, which has been read by then, but not n. On return the warp
// (block) sees what was emitted. Between two calls by a block, call sync_block().
template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse_warp(int C, bool strict, bool inverse, const Entry& entry, const Weight& weight,
                                            const Emit& emit);
template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse(const FactorSpace& space, int C, bool strict, bool inverse, const Entry& entry,
                                       const Weight& weight, const Emit& emit);

template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse_warp(int C, bool strict, bool inverse, const Entry& entry, const Weight& weight,
                                            const Emit& emit) {
  static_assert(kMost <= kFactorWarp);
  if constexpr (kMost > 8) {
    if (C <= kMost - 8) return logdet_inverse_warp<kMost - 8>(C, strict, inverse, entry, weight, emit);
  }
  return factor::by_warp<(kMost + 7) / 8 * 8>(C, strict, inverse, entry, weight, emit);
}

template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse(const FactorSpace& space, int C, bool strict, bool inverse, const Entry& entry,
                                       const Weight& weight, const Emit& emit) {
  static_assert(kMost <= kFactorClasses);
  if constexpr (kMost > kFactorWarp) {
    if (C > kFactorWarp) {
      return factor::by_block<(kMost + simt::kWarp - 1) / simt::kWarp>(space, C, strict, inverse, entry, weight, emit);
    }
  }
  if (simt::warp() == 0) {
    constexpr int kColumns = kMost < kFactorWarp ? kMost : kFactorWarp;
    const Determinant found = logdet_inverse_warp<kColumns>(C, strict, inverse, entry, weight, emit);
    if (simt::lane() == 0) {
      space.found[0] = found.log_abs_det;
      space.found[1] = found.sign;
      space.found[2] = static_cast<double>(found.kept);
    }
  }
  simt::sync_block();
  return {space.found[0], space.found[1], static_cast<int64_t>(space.found[2])};
}

}  // namespace ldmi::cuda
