#include "view.h"

namespace fused_optim {

std::string describe(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int d = 0; d < ndim; d++) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

const char* name_of(Dtype dtype) {
  constexpr const char* NAMES[] = {"float32", "float64", "bfloat16", "float16",
                                   "other",   "int8",    "uint8",    "int16"};
  return NAMES[dtype];
}

bool on_one_device(PyObject* a, PyObject* b) {
  const Ref of_a = get_attr(a, names.device), of_b = get_attr(b, names.device);
  const int equal = PyObject_RichCompareBool(of_a, of_b, Py_EQ);
  if (equal < 0) throw PythonError();
  return equal;
}

bool storage_holds(PyObject* tensor, const View& view) {
  const auto call = [](PyObject* object, PyObject* method) {
    return Ref::own(PyObject_CallMethodNoArgs(object, method));
  };
  const Ref storage = call(tensor, names.untyped_storage);
  const Ref nbytes = call(storage, names.nbytes), offset = call(tensor, names.storage_offset);
  const Dtype dtype = view.dtype == N_DTYPES ? view.whole : view.dtype;
  return (whole_number(offset) + view.reach()) * ITEMSIZE[dtype] <= whole_number(nbytes);
}

}  // namespace fused_optim
