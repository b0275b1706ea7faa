// log|det S| and V = S^{-T} of at most 32 classes by one warp, the matrix in registers.
#pragma once

#include "elimination.cuh"

namespace ldmi::cuda {

namespace factor {

template <int kColumns, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant by_warp(int C, bool strict, bool inverse, const Entry& entry, const Weight& weight, const Emit& emit) {
  const int i = lane();
  const double n = i < C ? weight(i) : 0.0;
  const double least_n = warp_sum(plan::least_part(n));
  const bool here = plan::is_present(n, least_n), small = plan::is_small(least_n);
  const unsigned present = ballot(here);
  const auto everywhere = [&](double value) {
    if (!inverse) return;
    sync_warp();  // emit may overwrite what other lanes have read
    for (int at = lane(); at < C * C; at += kWarp) emit(at / C, at % C, value);
    sync_warp();
  };
  double a[1][kColumns];
  // The whole warp takes the same branch. A bit is kept instead of a factor, because the matrix needs the registers.
  const auto lift = [&] {
    if (!small) return;
    LDMI_UNROLL
    for (int j = 0; j < kColumns; ++j) a[0][j] *= plan::lift_if(small);
  };
  Screening seen{};
  Pivots pivots;
  int p = i;         // of step `lane`
  int variable = i;  // the step whose pivot was in row `lane`
  bool regular = false;
  LDMI_UNROLL_BY(1)
  for (int attempt = 0; attempt < 2 && !regular; ++attempt) {
    LDMI_UNROLL
    for (int j = 0; j < kColumns; ++j) a[0][j] = i < C && j < C ? entry(i, j) : 0.0;
    lift();
    bool finite = isfinite(n);
    double sum = 0.0;
    const double scale = here ? 1.0 / (n * plan::lift_if(small)) : 0.0;
    LDMI_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      finite &= isfinite(a[0][j]);
      a[0][j] = here && (present >> j & 1u) != 0 ? a[0][j] * scale : (i == j && i < C ? 1.0 : 0.0);
      sum += abs(a[0][j]);
    }
    seen = {all(finite), strict, popcount(present), C};
    if (!seen.regular()) {
      everywhere(seen.finite ? 0.0 : kNaN);
      return seen.answer();
    }
    const double least = threshold(C, warp_max(sum));
    unsigned used = 0;
    if (attempt == 0) {
      regular = eliminate_diagonal(a, 0, C, least, used, [&](int step, double pivot) { pivots.take(step, pivot); });
    } else {
      regular = eliminate<1>(a, C, C, least, used, [&](int step, int row, double pivot) {
        pivots.take(step, pivot);
        if (lane() == step) p = row;
        if (lane() == row) variable = step;
      });
    }
  }
  if (!regular) {
    everywhere(0.0);
    return seen.singular();
  }
  pivots.count(0, C);
  if (here) pivots.product.multiply(n);
  bool odd = pivots.odd;
  for (int l = 0; l < C; ++l) {
    const int before = shfl(p, l);
    odd ^= l < i && i < C && before > p;
  }
  if (inverse) {
    sync_warp();  // emit may overwrite what other lanes have read
    lift();
    const double scale = here ? 1.0 / (n * plan::lift_if(small)) : 0.0;
    LDMI_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int l = c - (kColumns - C);
      if (l < 0) continue;
      const int row = shfl(p, l);
      const double row_scale = shfl(scale, row);
      const bool both = (present >> row & 1u) != 0 && (present >> variable & 1u) != 0;
      if (i < C) emit(row, variable, both ? a[0][c] * row_scale : 0.0);
    }
    sync_warp();
  }
  return {pivots.product.log(), popcount(ballot(odd)) % 2 == 0 ? 1.0 : -1.0, seen.kept()};
}

}  // namespace factor

}  // namespace ldmi::cuda
