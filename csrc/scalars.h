// The numbers that belong to one param: how many steps it has seen, how many went into its average.
// Each is one element of a tensor, which the host reads and writes, or a device's prepare.
#pragma once

#include "view.h"

namespace fused_optim {

// The address of a float32 or float64, as prepare takes it.
inline int64_t tagged(const void* address, Dtype dtype) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(address)) | (dtype == F64 ? 1 : 0);
}

struct Scalar {
  Ref object;                  // the tensor; none: there is no such scalar, or no tensor of it
  PyObject* key = nullptr;     // among the states; null: it is kept elsewhere
  void* data = nullptr;        // null: nothing is written
  const void* impl = nullptr;  // inside its TensorImpl: to prefetch
  Dtype dtype = F32;
  bool on_device = false;  // prepare reads and advances it there
  bool moved = false;      // `object` enters the states in place of one on the CPU
  double value = 0;        // after the step, if the host counts

  // Returns false if this is not a float tensor with one element on the CPU or the param's device.
  bool find(PyObject* candidate, const View& param);
  // From now on it is this number in a tensor on the param's device, made by the launcher.
  void move(PyObject* number, PyObject* param, const View& view, PyObject* launcher);
  double read() const {  // on the host, before the step
    return dtype == F32 ? *static_cast<float*>(data) : *static_cast<double*>(data);
  }
  // Returns the value after the step as it will be stored: a float32 counts to 2^24, as stock's.
  double advance(double to) { return value = dtype == F32 ? static_cast<float>(to) : to; }
  int64_t address() const { return on_device ? tagged(data, dtype) : 0; }
  // Writes the value back, if it is the host's.
  void write() const;
};

}  // namespace fused_optim
