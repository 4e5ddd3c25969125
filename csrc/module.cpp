// The Python module fastvae._C. Importing it registers the ops (csrc/ops/library.cpp), which torch.ops.fastvae calls.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops/bounds.h"
#include "ops/buffer_pool.h"
#include "ops/cpu_kernels.h"
#include "ops/latents.h"
#include "ops/likelihood_table.h"
#include "ops/nll.h"

namespace py = pybind11;

// The ops again, for calls as a training loop makes them, with plain tensors that fit together. For any other call they return
// None, and fastvae/functional takes the long way: its checks, which explain what is wrong and convert what is merely unusual, the
// choice of a backend, and the boxed call. That would take a tenth of a step whose kernels have just swept the caches, and most of the
// time that a GPU waits for the next launch.
namespace fastvae {
namespace {

bool serves_cuda = false;  // whether CUDA tensors use the native kernels

const Tensor* plain_tensor(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const Tensor& t = THPVariable_Unpack(object.ptr());
  const bool dense = (t.is_cpu() || (serves_cuda && t.is_cuda())) && t.layout() == at::kStrided && !t.is_nested();
  return dense && !at::isTensorSubclassLike(t) && !t._fw_grad(0).defined() ? &t : nullptr;
}

const Tensor* plain_floats(py::handle object) {
  const Tensor* t = plain_tensor(object);
  if (!t) return nullptr;
  const auto type = t->scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf ? t : nullptr;
}

// Whether a transform of torch.func or a TorchFunctionMode is active, which must see the op.
bool watched() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         at::impl::torch_function_mode_enabled();
}

py::object wrapped(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }
py::object wrapped(const Tensors& t) {
  py::tuple all(t.size());
  for (size_t i = 0; i < t.size(); ++i) all[i] = wrapped(t[i]);
  return all;
}
py::object wrapped(const std::tuple<Tensor, Tensor>& t) { return py::make_tuple(wrapped(std::get<0>(t)), wrapped(std::get<1>(t))); }

// The result of `op`, or None if it refuses its arguments. Torch translates other exceptions into Python's, because pybind11 could only
// do so if it were the version with which torch was built.
template <class Op>
PyObject* call(const Op& op) {
  HANDLE_TH_ERRORS
  try {
    const auto result = [&] {
      const py::gil_scoped_release no_gil;
      return op();
    }();
    return wrapped(result).release().ptr();
  } catch (const c10::ValueError&) {
    return py::none().release().ptr();
  } catch (const c10::TypeError&) {
    return py::none().release().ptr();
  } catch (const c10::NotImplementedError&) {  // Python chooses another backend
    return py::none().release().ptr();
  }
  END_HANDLE_TH_ERRORS
}

template <class Op>
py::object unless_refused(const Op& op) {
  PyObject* result = call(op);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object nll(std::string_view likelihood, const py::sequence& params, py::handle target, const std::vector<double>& constants,
               py::handle kl, py::handle beta, int64_t reduction, py::handle weight) {
  const auto& variant = likelihood_variant(likelihood);
  if (watched() || !(variant.elementwise() || variant.family == Family::discretized)) return py::none();
  Tensors tensors;
  for (const py::handle param : params) {
    const Tensor* t = plain_floats(param);
    if (!t) return py::none();
    tensors.push_back(*t);
  }
  if (variant.has_scalar && (tensors.back().dim() != 0 || tensors.back().scalar_type() != tensors[0].scalar_type())) return py::none();
  const Tensor* data = plain_tensor(target);
  // Only Python says whether a target may serve several rows.
  if (!data || data->dim() == 0 || tensors[0].dim() == 0 || data->size(0) != tensors[0].size(0)) return py::none();
  OptionalTensor row_kl, row_beta, weights;
  const auto device = tensors[0].device();
  bool together = data->device() == device;
  for (const Tensor& t : tensors) together &= t.device() == device;
  if (!kl.is_none()) {
    const Tensor *k = plain_floats(kl), *b = plain_floats(beta);
    if (!k || c10::isReducedFloatingType(k->scalar_type()) || !b || b->scalar_type() != at::kFloat) return py::none();
    together &= k->device() == device && b->device() == device;
    row_kl = *k;
    row_beta = *b;
  }
  if (!weight.is_none()) {
    const Tensor* w = plain_tensor(weight);
    if (!w) return py::none();
    together &= w->device() == device;
    weights = *w;
  }
  if (!together) return py::none();
  static const auto handle = op<Nll>("fastvae::nll");
  return unless_refused([&] { return handle.call(likelihood, tensors, *data, constants, row_kl, row_beta, reduction, weights); });
}

// Unlike the others, this is not an op, and has no long way: fastvae/bounds.py computes the same with torch's ops for what is refused here.
py::object iwae(std::string_view likelihood, const py::sequence& params, py::handle target, const std::vector<double>& constants,
                py::handle log_q, py::handle log_p, py::handle beta, int64_t reduction, py::handle weight) {
  if (watched() || c10::impl::dispatch_mode_enabled()) return py::none();
  bool plain = true;
  const auto on_cpu = [&](const Tensor* t) {
    plain &= t && t->is_cpu();
    return plain ? *t : Tensor();
  };
  Tensors tensors;
  for (const py::handle param : params) tensors.push_back(on_cpu(plain_floats(param)));
  const Tensor data = on_cpu(plain_tensor(target)), q = on_cpu(plain_floats(log_q)), p = on_cpu(plain_floats(log_p));
  const Tensor factor = on_cpu(plain_floats(beta));
  OptionalTensor weights;
  if (!weight.is_none()) weights = on_cpu(plain_tensor(weight));
  if (!plain || !serves_iwae_bound(likelihood_variant(likelihood), tensors, data, q, p, factor, weights)) return py::none();
  return unless_refused([&] { return iwae_bound(likelihood, tensors, data, constants, q, p, factor, reduction, weights); });
}

// mu and logvar, or a packed head and None.
struct PosteriorArgs {
  const Tensor* mu;
  OptionalTensor logvar;
  bool plain;

  PosteriorArgs(py::handle first, py::handle second) : mu(plain_floats(first)), plain(mu && !watched()) {
    if (!plain || second.is_none()) return;
    const Tensor* t = plain_floats(second);
    plain = t && t->device() == mu->device();
    if (plain) logvar = *t;
  }
};

// A standard normal prior, one draw, noise from the default generator.
py::object reparameterize_kl(py::handle mu, py::handle logvar, std::string_view form, const std::vector<double>& constants,
                             bool per_element) {
  const PosteriorArgs args(mu, logvar);
  if (!args.plain) return py::none();
  static const auto handle = op<ReparameterizeKl>("fastvae::reparameterize_kl");
  return unless_refused(
      [&] { return handle.call(*args.mu, args.logvar, {}, {}, form, constants, {}, per_element, {}, {}, 0, {}, {}); });
}

// A standard normal prior.
py::object gaussian_kl(py::handle mu, py::handle logvar, std::string_view form, const std::vector<double>& constants,
                       bool per_element) {
  const PosteriorArgs args(mu, logvar);
  if (!args.plain) return py::none();
  static const auto handle = op<KlForward>("fastvae::gaussian_kl");
  return unless_refused([&] { return handle.call(*args.mu, args.logvar, {}, {}, form, constants, {}, per_element); });
}

// The table of likelihoods in the format of table() in fastvae/_spec.py.
py::list likelihoods() {
  constexpr const char* families[] = {"continuous", "discretized", "counts", "categorical"};
  py::list rows;
  for (const auto& variant : kLikelihoods) {
    py::list integers;
    for (const auto type : types_of(variant.integers))
      integers.append(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(type))));
    rows.append(py::make_tuple(variant.name, families[int(variant.family)], name_of(variant.element), variant.tensors, variant.constants, variant.packed,
                               variant.has_scalar, variant.is_location, py::tuple(integers)));
  }
  return rows;
}

}  // namespace
}  // namespace fastvae

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of fastvae, reached through torch.ops.fastvae and through `fast_path`.";
  m.def("cpu_capability", [] { return fastvae::cpu::kernels().capability; }, "The instruction set of the CPU kernels in use.");
  m.def("empty_buffer_pool", &fastvae::empty_buffer_pool, "Release the unused CPU buffers and return their size in bytes.");
  m.def("likelihoods", &fastvae::likelihoods, "The table of likelihoods; see table() in fastvae/_spec.py.");
  auto fast_path = m.def_submodule("fast_path", "The ops for plain tensors that fit together; they return None for any others.");
  fast_path.def("serve_cuda", [](bool on) { fastvae::serves_cuda = on; }, "Set whether CUDA tensors use the native kernels.");
  fast_path.def("nll", &fastvae::nll);
  fast_path.def("iwae", &fastvae::iwae);
  fast_path.def("reparameterize_kl", &fastvae::reparameterize_kl);
  fast_path.def("gaussian_kl", &fastvae::gaussian_kl);
}
