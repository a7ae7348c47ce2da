#include "scalars.h"

#include <cmath>

namespace fused_optim {

bool Scalar::find(PyObject* candidate, const View& param) {
  View view;
  if (candidate == nullptr || !is_plain(candidate) || !view.read(candidate) || view.numel() != 1 ||
      (view.device.type != dlpack::CPU && view.device != param.device) ||
      (view.dtype != F32 && view.dtype != F64) || view.data == nullptr)
    return false;
  tensor = Ref::share(candidate);
  data = view.data;
  impl = view.shape;
  dtype = view.dtype;
  on_device = view.device.type != dlpack::CPU;
  return true;
}

void Scalar::move(PyObject* number, PyObject* param, const View& view, PyObject* launcher) {
  const Ref moved =
      Ref::own(PyObject_CallMethodObjArgs(launcher, names.scalar, number, param, nullptr));
  if (!find(moved, view)) raise(PyExc_TypeError, "launcher.scalar must return a tensor");
  on_device = true;  // the interpreter's device is the CPU
}

bool Scalar::count() {
  if (dtype == F32)
    value = *static_cast<float*>(data) + 1.0f;  // saturates at 2^24, as stock's does
  else
    value = *static_cast<double*>(data) + 1.0;
  return value >= 1 && value <= 9007199254740992.0 && value == std::floor(value);
}

void Scalar::write() const {
  if (on_device || data == nullptr) return;
  if (dtype == F32)
    *static_cast<float*>(data) = static_cast<float>(value);
  else
    *static_cast<double*>(data) = value;
}

}  // namespace fused_optim
