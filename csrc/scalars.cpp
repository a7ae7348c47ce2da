#include "scalars.h"

namespace fused_optim {

bool Scalar::find(PyObject* candidate, const View& param) {
  View view;
  if (candidate == nullptr || !is_plain(candidate) || !view.read(candidate) || view.numel() != 1 ||
      (view.device.type != dlpack::CPU && view.device != param.device) ||
      (view.dtype != F32 && view.dtype != F64) || view.data == nullptr)
    return false;
  object = Ref::share(candidate);
  data = view.data;
  impl = view.shape;
  dtype = view.dtype;
  on_device = view.device.type != dlpack::CPU;
  return true;
}

void Scalar::move(PyObject* number, PyObject* param, const View& view, PyObject* launcher) {
  const Ref made =
      Ref::own(PyObject_CallMethodObjArgs(launcher, names.scalar, number, param, nullptr));
  if (!find(made, view)) raise(PyExc_TypeError, "launcher.scalar must return a tensor");
  on_device = moved = true;  // the interpreter's device is the CPU
}

void Scalar::write() const {
  if (on_device || data == nullptr) return;
  if (dtype == F32)
    *static_cast<float*>(data) = static_cast<float>(value);
  else
    *static_cast<double*>(data) = value;
}

}  // namespace fused_optim
