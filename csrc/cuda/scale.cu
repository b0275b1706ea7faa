// The launch of scale, for the types that there are: a gradient is left in the type of the logits, or in fp32 for half precision; the
// factor is of the loss's type.

#include "scale.cuh"

namespace ldmi::cuda {

int scale(const void* in, Type in_type, const void* factor, Type factor_type, int64_t count, void* out, Type out_type,
          const DeviceLimits& limits, simt::Stream stream) {
  using simt::BFloat16;
  using simt::Half;
  const auto is = [&](Type from, Type by, Type to) { return in_type == from && factor_type == by && out_type == to; };
  constexpr Type f16 = Type::kFloat16, bf16 = Type::kBFloat16, f32 = Type::kFloat32, f64 = Type::kFloat64;
  if (is(f32, f32, f32)) return launch_scale<float, float, float>(in, factor, count, out, limits, stream);
  if (is(f64, f64, f64)) return launch_scale<double, double, double>(in, factor, count, out, limits, stream);
  if (is(f16, f32, f16)) return launch_scale<Half, Half, float>(in, factor, count, out, limits, stream);
  if (is(bf16, f32, bf16)) return launch_scale<BFloat16, BFloat16, float>(in, factor, count, out, limits, stream);
  if (is(f32, f32, f16)) return launch_scale<float, Half, float>(in, factor, count, out, limits, stream);
  if (is(f32, f32, bf16)) return launch_scale<float, BFloat16, float>(in, factor, count, out, limits, stream);
  return 1;  // cudaErrorInvalidValue
}

}  // namespace ldmi::cuda
