// The Python face of the kernels: fused_optim._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "plan.h"

namespace py = pybind11;
using namespace fused_optim;

namespace {

py::dict describe_rules() {
  py::dict described;
  for (const RuleInfo& rule : rules()) {
    py::dict entry;
    py::list options, states, scalars, hypers, kinds;
    for (const char* name : rule.option_names) options.append(name);
    for (const char* name : rule.state_names) states.append(name);
    for (const char* name : rule.scalar_names) scalars.append(name);
    for (const char* name : rule.hyper_names) hypers.append(name);
    for (size_t s = 0; s < rule.state_names.size(); s++)
      kinds.append(STATE_KIND_NAMES[rule.state_kinds[s]]);
    entry["options"] = options;
    entry["states"] = states;
    entry["hypers"] = hypers;
    entry["scalars"] = scalars;
    entry["kinds"] = kinds;
    entry["optional"] = rule.optional;
    entry["has_step"] = rule.has_step;
    entry["prepares_before"] = rule.prepares_before;
    described[rule.name] = entry;
  }
  return described;
}

const RuleInfo& rule_of(const std::string& name, const std::vector<double>& options,
                        const std::vector<double>& scalars) {
  for (const RuleInfo& rule : rules()) {
    if (name != rule.name) continue;
    if (options.size() != rule.option_names.size())
      throw std::invalid_argument(name + " has " + std::to_string(rule.option_names.size()) +
                                  " options");
    if (scalars.size() != rule.scalar_names.size())
      throw std::invalid_argument(name + " has " + std::to_string(rule.scalar_names.size()) +
                                  " scalars");
    return rule;
  }
  throw std::invalid_argument("no rule is called '" + name + "'");
}

// The hypers that the rule prepares, in double. For tests of the same arithmetic elsewhere, as is
// `advance`.
std::vector<double> prepare(const std::string& name, const std::vector<double>& options,
                            const std::vector<double>& scalars) {
  const RuleInfo& rule = rule_of(name, options, scalars);
  double hypers[MAX_HYPERS] = {};
  rule.prepare(options.data(), scalars.data(), hypers);
  return {hypers, hypers + rule.hyper_names.size()};
}

// The scalars after a step, not yet rounded to the dtype that they are stored in.
std::vector<double> advance(const std::string& name, const std::vector<double>& options,
                            std::vector<double> scalars, bool in_float32) {
  rule_of(name, options, scalars).advance(options.data(), scalars.data(), in_float32, in_float32);
  return scalars;
}

template <class T>
void bind_table(py::module_& m, const char* name) {
  py::class_<Table<T>>(m, name)
      .def_property_readonly("version", &Table<T>::version)
      .def_property_readonly(
          "nbytes", [](const Table<T>& table) { return table.current().size() * sizeof(T); })
      .def("tolist", [](const Table<T>& table) { return table.current(); })
      .def(
          "copy_to",
          [](const Table<T>& table, uintptr_t address) {
            std::memcpy(reinterpret_cast<void*>(address), table.current().data(),
                        table.current().size() * sizeof(T));
          },
          py::arg("address"));
}

// One in-place pass over contiguous float32 CPU tensors of one length: the last is only read, the
// others are read and written.
void probe(const std::vector<py::object>& streams, int num_threads) {
  const int n = static_cast<int>(streams.size());
  if (n < 2 || n > EMA) throw std::invalid_argument("probe takes 2 to 5 streams");
  Task task = {};
  double factor = 0.5;
  for (int s = 0; s < n; s++) {
    const auto numel = streams[s].attr("numel")().cast<int64_t>();
    if (s > 0 && numel != task.slice.numel)
      throw std::invalid_argument("probe takes streams of one length");
    if (!streams[s].attr("is_contiguous")().cast<bool>() ||
        py::str(streams[s].attr("dtype")).cast<std::string>() != "torch.float32" ||
        py::str(streams[s].attr("device")).cast<std::string>() != "cpu")
      throw std::invalid_argument("probe takes contiguous float32 tensors on the CPU");
    task.slice.numel = numel;
    const int at = s == n - 1 ? GRAD : s == 0 ? PARAM : STATES + s - 1;
    task.slice.streams[at] =
        reinterpret_cast<void*>(streams[s].attr("data_ptr")().cast<uintptr_t>());
    task.slice.dtypes[at] = F32;
    task.streams |= 1u << at;
  }
  task.written = task.streams & ~(1u << GRAD);
  task.kernel = current_isa().probe[n - 2];
  task.layout = -1;
  task.device = -1;
  task.packing = -1;
  task.slice.hypers = &factor;
  task.slice.grad_sign = 1;
  task.slice.clip = 1;
  py::gil_scoped_release no_gil;
  run({task}, {}, num_threads);
}

template <size_t N, class Names>
int find_name(const std::string& name, const Names& name_of_one) {
  for (size_t i = 0; i < N; i++)
    if (name == name_of_one(i)) return static_cast<int>(i);
  throw std::invalid_argument("unknown: " + name);
}

Storage find_storage(const std::string& name) {
  return static_cast<Storage>(
      find_name<std::size(STORAGE_NAMES)>(name, [](size_t i) { return STORAGE_NAMES[i]; }));
}

Dtype find_dtype(const std::string& name) {
  return static_cast<Dtype>(find_name<std::size(ITEMSIZE)>(
      name, [](size_t i) { return name_of(static_cast<Dtype>(i)); }));
}

// See storage_of; state_dtype: "" for torch.optim's.
py::tuple describe_storage(const std::string& state_dtype, const std::string& kind,
                           const std::string& param, int64_t numel) {
  const auto format = static_cast<StateFormat>(find_name<std::size(STATE_FORMAT_NAMES)>(
      state_dtype, [](size_t i) { return STATE_FORMAT_NAMES[i]; }));
  const auto state_kind = static_cast<StateKind>(
      find_name<std::size(STATE_KIND_NAMES)>(kind, [](size_t i) { return STATE_KIND_NAMES[i]; }));
  const Stored stored = storage_of(format, state_kind, find_dtype(param), numel);
  return py::make_tuple(STORAGE_NAMES[stored.storage], name_of(stored.dtype));
}

// Addresses of contiguous CPU memory; `extra` is that of scales or of a remainder, or 0.
void transcode(bool packs, const std::string& storage, const std::string& dtype, uintptr_t stream,
               uintptr_t extra, uintptr_t values, int64_t numel, std::array<uint64_t, 4> key,
               int num_threads, int64_t offset) {
  const int s = static_cast<int>(key[2]);
  if (s != PARAM && (s < STATES || s >= STATES + MAX_STATES))
    throw std::invalid_argument("stream " + std::to_string(s) + " cannot be packed");
  Packing packing = {};
  packing.storage[s] = find_storage(storage);
  Slice slice = {};
  slice.packing = &packing;
  slice.numel = numel;
  slice.streams[s] = reinterpret_cast<void*>(stream);
  slice.dtypes[s] = find_dtype(dtype);
  if (s == PARAM)
    slice.remainder = reinterpret_cast<void*>(extra);
  else
    packing.scales[s] = reinterpret_cast<uint16_t*>(extra);
  packing.offset = offset;
  random_key(random_seed(key[0], key[1], s), key[3], packing.keys[s]);
  float* const floats = reinterpret_cast<float*>(values);
  py::gil_scoped_release no_gil;
  packs ? pack(slice, s, floats, num_threads) : unpack(slice, s, floats, num_threads);
}

}  // namespace

namespace fused_optim {
Ref to_python(const std::shared_ptr<Batch>& batch) {
  const BatchKey& key = batch->key;
  py::tuple dtypes(batch->streams.size()), storages(batch->streams.size());
  for (size_t i = 0; i < batch->streams.size(); i++) {
    const Dtype dtype = key.dtypes[batch->streams[i]];
    dtypes[i] = dtype == N_DTYPES ? py::object(py::none()) : py::str(name_of(dtype));
    storages[i] = STORAGE_NAMES[key.storages[batch->streams[i]]];
  }
  py::object object = py::cast(batch);
  object.attr("key") =
      py::make_tuple(key.device.type, key.device.index, dtypes, storages, key.prepared_on_device);
  return Ref::own(object.release().ptr());
}

Ref to_python(const std::shared_ptr<GradBatch>& batch) {
  py::object object = py::cast(batch);
  object.attr("key") =
      py::make_tuple(batch->device.type, batch->device.index, name_of(batch->dtype));
  return Ref::own(object.release().ptr());
}
}  // namespace fused_optim

namespace {

py::object to_pybind(Ref owned) { return py::reinterpret_steal<py::object>(owned.release()); }

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&>(), py::arg("rule"))
      .def(
          "gather",
          [](Plan& plan, py::handle optimizer, py::list groups, py::handle launcher,
             unsigned device_types, unsigned bits, std::optional<py::tuple> lists) {
            return plan.gather({optimizer.ptr(), groups.ptr(), launcher.ptr(), device_types, bits,
                                lists ? lists->ptr() : nullptr});
          },
          py::arg("optimizer"), py::arg("groups"), py::arg("launcher"), py::arg("device_types"),
          py::arg("bits"), py::arg("lists") = std::nullopt)
      .def("tasks", [](const Plan& plan) { return to_pybind(plan.tasks()); })
      .def("fallbacks", [](const Plan& plan) { return to_pybind(plan.fallbacks()); })
      .def("averages_left", [](const Plan& plan) { return to_pybind(plan.averages_left()); })
      .def("n_on_cpu", &Plan::n_on_cpu)
      .def("host_counts", &Plan::host_counts)
      .def("grad_write", [](const Plan& plan) { return static_cast<int>(plan.grad_write()); })
      .def("sum_of_squares",
           [](Plan& plan, int num_threads) { return to_pybind(plan.sum_of_squares(num_threads)); })
      .def("tasks_to_stage", [](const Plan& plan) { return to_pybind(plan.tasks_to_stage()); })
      .def("stage",
           [](Plan& plan, size_t task, py::list copies) { plan.stage(task, copies.ptr()); })
      .def("batches", [](Plan& plan) { return to_pybind(plan.batches()); })
      .def("grad_batches", [](Plan& plan) { return to_pybind(plan.grad_batches()); })
      .def("drop_devices",
           [](Plan& plan, const std::string& reason) { plan.drop_devices(reason.c_str()); })
      .def("begin_commit", &Plan::begin_commit)
      .def("commit",
           [](Plan& plan, double clip, double grad_scale, int num_threads) {
             return to_pybind(plan.commit(clip, grad_scale, num_threads));
           })
      .def("release", &Plan::release);
  for (const auto& [name, bit] : BIT_NAMES) m.attr(name) = static_cast<unsigned>(bit);
}

void bind_tables(py::module_& m) {
  bind_table<int64_t>(m, "IntTable");
  bind_table<double>(m, "FloatTable");
  bind_table<int32_t>(m, "WordTable");
  py::class_<Batch, std::shared_ptr<Batch>>(m, "Batch", py::dynamic_attr())  // for `key`, made once
      .def_property_readonly("n_tensors", &Batch::n_tensors)
      .def_property_readonly("version", &Batch::version)
      .def_property_readonly("words",
                             [](const Batch& batch) -> py::object {
                               if (!batch.by_value()) return py::none();
                               const std::vector<int32_t>& row = batch.hypers.current();
                               const size_t n = batch.key.wide() ? 2 : 1;
                               py::tuple words(row.size() / n);
                               for (size_t i = 0; i < words.size(); i++) {
                                 int64_t word = row[i];
                                 if (n == 2) std::memcpy(&word, &row[2 * i], sizeof word);
                                 words[i] = word;
                               }
                               return words;
                             })
      .def_readonly("numels", &Batch::numels)
      .def_readonly("tensors", &Batch::tensors)
      .def_readonly("scalars", &Batch::scalars)
      .def_readonly("addresses", &Batch::addresses)
      .def_readonly("options", &Batch::options)
      .def_readonly("hypers", &Batch::hypers);
  py::class_<GradBatch, std::shared_ptr<GradBatch>>(m, "GradBatch", py::dynamic_attr())
      .def_property_readonly("version", &GradBatch::version)
      .def_readonly("numels", &GradBatch::numels)
      .def_readonly("grads", &GradBatch::grads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fused_optim for CPUs.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const PythonError&) {  // already set
    }
  });
  try {
    bind_torch();
  } catch (const PythonError&) {
    throw py::error_already_set();
  }
  bind_plan(m);
  bind_tables(m);
  m.attr("ODD_OPTIONS") = ODD_OPTIONS;
  m.attr("ODD_STATE") = ODD_STATE;
  m.attr("ODD_STEP") = ODD_STEP;
  m.attr("SCALE_BLOCK") = SCALE_BLOCK;
  m.attr("SMALLEST_INT8") = SMALLEST_INT8;
  m.def("rules", &describe_rules);
  m.def(
      "sum_of_squares",
      [](py::list grads, int num_threads) {
        return to_pybind(fused_optim::sum_of_squares(grads.ptr(), num_threads));
      },
      py::arg("grads"), py::arg("num_threads"));
  m.def("prepare", &prepare, py::arg("rule"), py::arg("options"), py::arg("scalars"));
  m.def("advance", &advance, py::arg("rule"), py::arg("options"), py::arg("scalars"),
        py::arg("in_float32"));
  m.def("isas", &available_isas);
  m.def("isa", [] { return std::string(current_isa().name); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("chunks", &chunks, py::arg("numel"));
  m.def("openmp_library", &openmp_library);
  m.def("transcode", &transcode, py::arg("packs"), py::arg("storage"), py::arg("dtype"),
        py::kw_only(), py::arg("stream"), py::arg("extra"), py::arg("values"), py::arg("numel"),
        py::arg("key"), py::arg("num_threads"), py::arg("offset") = 0);
  m.def("storage_of", &describe_storage, py::arg("state_dtype"), py::arg("kind"), py::arg("param"),
        py::arg("numel"));
  m.def("probe", &probe, py::arg("streams"), py::arg("num_threads"));
}
