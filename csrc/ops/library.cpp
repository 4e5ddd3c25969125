// The schemas of fastvae::*. Users call the op without a suffix, which records the graph (latents.cpp, mixture.cpp, nll.cpp,
// nll_elements.cpp). Its _forward and _backward do the work on each device (latents_cpu.cpp, and so on).
#include <torch/library.h>

TORCH_LIBRARY(fastvae, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> random = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};

#define POSTERIOR                                                                                                             \
  "Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, str form, float[] constants, float? balance"
#define NOISE "int? samples, Tensor? seed, int row_offset, Tensor? eps, Generator? generator"
  m.def("reparameterize_kl(" POSTERIOR ", bool per_element, " NOISE ") -> (Tensor z, Tensor kl)", random);
  m.def("reparameterize_kl_forward(" POSTERIOR ", bool per_element, " NOISE ") -> (Tensor z, Tensor kl, Tensor used_seed)", random);
  m.def("reparameterize_kl_backward(Tensor? grad_z, Tensor? grad_kl, " POSTERIOR
        ", int? samples, Tensor seed, int row_offset, Tensor? eps, int needs) -> Tensor[]",
        tags);
#define DENSITIES "Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, str form, float[] constants, bool stl"
#define DRAWS "int samples, Tensor? seed, int row_offset, Tensor? eps, Generator? generator"
  m.def("sample_log_probs(" DENSITIES ", " DRAWS ") -> (Tensor z, Tensor log_q, Tensor log_p)", random);
  m.def("sample_log_probs_forward(" DENSITIES ", " DRAWS ") -> (Tensor z, Tensor log_q, Tensor log_p, Tensor used_seed)", random);
  m.def("sample_log_probs_backward(Tensor? grad_z, Tensor? grad_log_q, Tensor? grad_log_p, " DENSITIES
        ", int samples, Tensor seed, int row_offset, Tensor? eps, int needs) -> Tensor[]",
        tags);
  m.def("gaussian_kl(" POSTERIOR ", bool per_element) -> Tensor", tags);
  m.def("gaussian_kl_forward(" POSTERIOR ", bool per_element) -> Tensor", tags);
  m.def("gaussian_kl_backward(Tensor grad_kl, " POSTERIOR ", int needs) -> Tensor[]", tags);
  m.def(
      "nll(str likelihood, Tensor[] params, Tensor target, float[] constants, Tensor? kl, Tensor? beta, int reduction, "
      "Tensor? weight=None) -> (Tensor loss, Tensor nll)",
      tags);
  m.def(
      "nll_forward(str likelihood, Tensor[] params, Tensor target, float[] constants, Tensor? kl, Tensor? beta, int reduction, "
      "int needs, Tensor? weight=None) -> (Tensor loss, Tensor nll, Tensor[] gradients, Tensor scalar_rows)",
      tags);
  m.def(
      "nll_gradient(str likelihood, Tensor[] params, Tensor target, float[] constants, Tensor? grad_loss, Tensor? grad_nll, "
      "int reduction, int needs, Tensor? weight=None) -> Tensor[]",
      tags);
  m.def(
      "nll_backward(Tensor? grad_loss, Tensor? grad_nll, Tensor[] gradients, Tensor? scalar_rows, Tensor? kl, Tensor? beta, "
      "SymInt rows, int reduction, bool need_kl, bool need_beta) -> Tensor[]",
      tags);
  m.def(
      "nll_backward_(Tensor? grad_loss, Tensor? grad_nll, Tensor(a!)[] gradients, Tensor? scalar_rows, Tensor? kl, "
      "Tensor? beta, SymInt rows, int reduction, bool need_kl, bool need_beta) -> Tensor[]",
      tags);
  m.def(
      "gaussian_mixture_log_prob(Tensor z, Tensor mu, Tensor logvar, Tensor? log_weight, bool joint, bool per_dimension) "
      "-> (Tensor joint, Tensor per_dimension)",
      tags);
  m.def(
      "gaussian_mixture_log_prob_forward(Tensor z, Tensor mu, Tensor logvar, Tensor? log_weight, bool joint, bool per_dimension) "
      "-> (Tensor joint, Tensor per_dimension)",
      tags);
  m.def(
      "gaussian_mixture_log_prob_backward(Tensor? grad_joint, Tensor? grad_per_dimension, Tensor z, Tensor mu, Tensor logvar, "
      "Tensor? log_weight, Tensor joint, Tensor per_dimension, int needs) -> Tensor[]",
      tags);
  m.def("sparse_linear(Tensor values, Tensor starts, Tensor columns, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def("sparse_linear_forward(Tensor values, Tensor starts, Tensor columns, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def("sparse_linear_backward(Tensor grad, Tensor values, Tensor starts, Tensor columns, Tensor weight, int needs) -> Tensor[]", tags);
  m.def("nll_elements(str likelihood, Tensor[] params, Tensor target, float[] constants, float factor, Tensor? weight=None) -> Tensor",
        tags);
  m.def(
      "nll_elements_forward(str likelihood, Tensor[] params, Tensor target, float[] constants, float factor, int needs, "
      "Tensor? weight=None) -> (Tensor values, Tensor[] derivatives)",
      tags);
  m.def("nll_elements_backward(Tensor grad, Tensor[] derivatives, int shared, ScalarType dtype) -> Tensor[]", tags);
  m.def("nll_elements_backward_(Tensor grad, Tensor(a!)[] derivatives, int shared) -> Tensor[]", tags);
}
