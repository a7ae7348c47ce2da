// Arithmetic that the rules share: the same bits with every libm, compiler and instruction set, and
// in triton_kernels. Included inside a namespace, before rules.h.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

// Repeated squaring instead of std::pow: the same bits with every libm and on a GPU.
inline double integer_power(double base, double exponent) {
  double result = 1.0;
  for (auto n = static_cast<unsigned long long>(exponent); n != 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// The binary logarithm of a positive normal number, by operations that are rounded alike
// everywhere, for the same reason. Infinity counts as 2^1024; NaN for another number.
inline double log2_of(double x) {
  if (!(x >= DBL_MIN)) return std::numeric_limits<double>::quiet_NaN();
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  auto whole = static_cast<double>((bits >> 52) - 1023);
  bits = (bits & 0xfffffffffffff) | (int64_t{1023} << 52);
  double fraction;
  std::memcpy(&fraction, &bits, sizeof fraction);
  if (fraction > 1.4142135623730951) {
    fraction = fraction * 0.5;
    whole = whole + 1;
  }
  // log(fraction) = 2 * artanh(s) = 2 * (s + s^3 / 3 + s^5 / 5 + ...), |s| < 0.172
  const double s = (fraction - 1) / (fraction + 1);
  const double square = s * s;
  double sum = 1.0 / 27;
  for (int k = 25; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return whole + 2 * s * sum * 1.4426950408889634;
}

// 2^x, in the same way; x is clamped to +-1000.
inline double exp2_of(double x) {
  if (x != x) return std::numeric_limits<double>::quiet_NaN();
  x = x > 1000 ? 1000 : x;
  x = x < -1000 ? -1000 : x;
  // exp(rest) = 1 + rest + rest^2 / 2 + rest^3 / 6 + ..., |rest| < 0.347
  const int64_t nearest = static_cast<int64_t>(x + 1024.5) - 1024;
  const double rest = (x - static_cast<double>(nearest)) * 0.6931471805599453;
  double sum = 1;
  for (int k = 16; k >= 1; k--) sum = 1 + sum * (rest * (1.0 / k));
  const int64_t bits = (nearest + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

// A positive normal base to a real exponent: within 4 * (5 + |log2 of the result|) units of 2^-53.
inline double power(double base, double exponent) { return exp2_of(log2_of(base) * exponent); }

// torch.maximum: a NaN on either side stays.
template <class T>
inline T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// torch.sign: 0 for NaN.
template <class T>
inline T sign(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : T(0);
}

// torch.lerp: measured from the nearer end, so that weight == 1 gives end.
template <class T>
inline T lerp(T start, T end, T weight) {
  const bool near_start = weight < T(0.5);
  return (near_start ? start : end) + (near_start ? weight : weight - T(1)) * (end - start);
}
