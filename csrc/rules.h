// Every update rule, simplest first. A rule is arithmetic on one element: it knows no pointer,
// dtype, thread or storage format. Each rule names its options (keys of a param group; "betas.0" is
// the first item of group["betas"]) and its states (keys of optimizer.state[param]), and has
//   Options   what a param group says, as doubles in the order of option_names
//   FLAGS     bit i: option i is true or false
//   variant   the compile-time choices that these options make
//   Hypers    the numbers one element needs, all of type T, in the order of hyper_names
//   prepare   Options and step -> Hypers, in double, once per tensor
//   update    one element; grad is already unscaled and, if maximizing, negated
//
// Included inside a namespace: each instruction set compiles its own copy (see apply.inl).
// The order of operations is torch.optim's non-fused code's unless a comment says otherwise.
#include <cmath>

// Repeated squaring instead of std::pow: the same bits with every libm and on a GPU.
inline double integer_power(double base, double exponent) {
  double result = 1.0;
  for (auto n = static_cast<unsigned long long>(exponent); n != 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// torch.lerp: measured from the nearer end, so that weight == 1 gives end.
template <class T>
inline T lerp(T start, T end, T weight) {
  const bool near_start = weight < T(0.5);
  return (near_start ? start : end) + (near_start ? weight : weight - T(1)) * (end - start);
}

// SGD with momentum as in Sutskever et al. 2013, "On the importance of initialization and momentum
// in deep learning", in torch.optim's form: the learning rate multiplies the buffer, not the grad.
struct SGD {
  static constexpr const char* name = "sgd";
  static constexpr const char* option_names[] = {"lr", "momentum", "dampening", "weight_decay",
                                                 "nesterov"};
  static constexpr const char* state_names[] = {"momentum_buffer"};
  static constexpr const char* hyper_names[] = {"lr", "momentum", "dampening_comp", "weight_decay"};
  static constexpr unsigned FLAGS = 0b10000;
  static constexpr unsigned SQUARES = 0;  // states like a second moment
  static constexpr bool has_step = false;

  enum : unsigned { WEIGHT_DECAY = 1, MOMENTUM = 2, NESTEROV = 4, FIRST_STEP = 8, VARIANTS = 16 };
  static constexpr bool valid(unsigned variant) {
    return (variant & MOMENTUM) || !(variant & (NESTEROV | FIRST_STEP));
  }
  static constexpr unsigned states(unsigned variant) { return variant & MOMENTUM ? 0b1 : 0; }
  static constexpr unsigned lerped_states(unsigned) { return 0; }
  static constexpr bool decays_grad(unsigned variant) { return variant & WEIGHT_DECAY; }

  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov;
  };
  static unsigned variant(const Options& o) {
    return (o.weight_decay != 0 ? WEIGHT_DECAY : 0u) | (o.momentum != 0 ? MOMENTUM : 0u) |
           (o.momentum != 0 && o.nesterov != 0 ? NESTEROV : 0u);
  }

  template <class T>
  struct Hypers {
    T lr, momentum, dampening_comp, weight_decay;
  };
  static Hypers<double> prepare(const Options& o, double /*step*/) {
    return {o.lr, o.momentum, 1 - o.dampening, o.weight_decay};
  }

  template <unsigned VARIANT, class T>
  static inline void update(T& param, T grad, T& momentum_buffer, T&, T&, const Hypers<T>& h) {
    if constexpr (VARIANT & WEIGHT_DECAY) grad = grad + h.weight_decay * param;
    if constexpr (VARIANT & MOMENTUM) {
      if constexpr (VARIANT & FIRST_STEP)
        momentum_buffer = grad;
      else
        momentum_buffer = h.momentum * momentum_buffer + h.dampening_comp * grad;
      if constexpr (VARIANT & NESTEROV)
        grad = grad + h.momentum * momentum_buffer;
      else
        grad = momentum_buffer;
    }
    param = param - h.lr * grad;
  }
};

// Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2, in the order of
// the authors' PyTorch code.
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr const char* option_names[] = {"lr", "betas.0", "betas.1", "weight_decay"};
  static constexpr const char* state_names[] = {"exp_avg"};
  static constexpr const char* hyper_names[] = {"lr",    "beta1",      "beta1_comp",
                                                "beta2", "beta2_comp", "param_decay"};
  static constexpr unsigned FLAGS = 0;
  static constexpr unsigned SQUARES = 0;  // states like a second moment
  static constexpr bool has_step = false;

  enum : unsigned { WEIGHT_DECAY = 1, FIRST_STEP = 0, VARIANTS = 2 };
  static constexpr bool valid(unsigned) { return true; }
  static constexpr unsigned states(unsigned) { return 0b1; }
  static constexpr unsigned lerped_states(unsigned) { return 0; }
  static constexpr bool decays_grad(unsigned) { return false; }

  struct Options {
    double lr, beta1, beta2, weight_decay;
  };
  static unsigned variant(const Options& o) { return o.weight_decay != 0 ? WEIGHT_DECAY : 0u; }

  template <class T>
  struct Hypers {
    T lr, beta1, beta1_comp, beta2, beta2_comp, param_decay;
  };
  static Hypers<double> prepare(const Options& o, double /*step*/) {
    return {o.lr, o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2, 1 - o.lr * o.weight_decay};
  }

  template <unsigned VARIANT, class T>
  static inline void update(T& param, T grad, T& exp_avg, T&, T&, const Hypers<T>& h) {
    if constexpr (VARIANT & WEIGHT_DECAY) param = param * h.param_decay;
    const T direction = h.beta1 * exp_avg + h.beta1_comp * grad;
    // torch.sign: 0 for NaN.
    param = param - h.lr * (direction > 0 ? T(1) : direction < 0 ? T(-1) : T(0));
    exp_avg = h.beta2 * exp_avg + h.beta2_comp * grad;
  }
};

// Duchi, Hazan, Singer 2011, "Adaptive subgradient methods", diagonal form.
struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr const char* option_names[] = {"lr", "lr_decay", "eps", "weight_decay"};
  static constexpr const char* state_names[] = {"sum"};
  static constexpr const char* hyper_names[] = {"decayed_lr", "eps", "weight_decay"};
  static constexpr unsigned FLAGS = 0;
  static constexpr unsigned SQUARES = 0b1;  // states like a second moment
  static constexpr bool has_step = true;

  enum : unsigned { WEIGHT_DECAY = 1, FIRST_STEP = 0, VARIANTS = 2 };
  static constexpr bool valid(unsigned) { return true; }
  static constexpr unsigned states(unsigned) { return 0b1; }
  static constexpr unsigned lerped_states(unsigned) { return 0; }
  static constexpr bool decays_grad(unsigned variant) { return variant & WEIGHT_DECAY; }

  struct Options {
    double lr, lr_decay, eps, weight_decay;
  };
  static unsigned variant(const Options& o) { return o.weight_decay != 0 ? WEIGHT_DECAY : 0u; }

  template <class T>
  struct Hypers {
    T decayed_lr, eps, weight_decay;
  };
  static Hypers<double> prepare(const Options& o, double step) {
    return {o.lr / (1 + (step - 1) * o.lr_decay), o.eps, o.weight_decay};
  }

  template <unsigned VARIANT, class T>
  static inline void update(T& param, T grad, T& sum, T&, T&, const Hypers<T>& h) {
    if constexpr (VARIANT & WEIGHT_DECAY) grad = grad + h.weight_decay * param;
    sum = sum + grad * grad;
    param = param - h.decayed_lr * grad / (std::sqrt(sum) + h.eps);
  }
};

// Hinton's lecture 6e (2012); centered as in Graves 2013, "Generating sequences with recurrent
// neural networks"; eps is added after the square root, as in torch.optim.
struct RMSprop {
  static constexpr const char* name = "rmsprop";
  static constexpr const char* option_names[] = {"lr",           "alpha",    "eps",
                                                 "weight_decay", "momentum", "centered"};
  static constexpr const char* state_names[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr const char* hyper_names[] = {"lr",  "alpha",        "alpha_comp",
                                                "eps", "weight_decay", "momentum"};
  static constexpr unsigned FLAGS = 0b100000;
  static constexpr unsigned SQUARES = 0b001;  // states like a second moment
  static constexpr bool has_step = true;

  enum : unsigned { WEIGHT_DECAY = 1, MOMENTUM = 2, CENTERED = 4, FIRST_STEP = 0, VARIANTS = 8 };
  static constexpr bool valid(unsigned) { return true; }
  static constexpr unsigned states(unsigned variant) {
    return 0b1 | (variant & MOMENTUM ? 0b10 : 0) | (variant & CENTERED ? 0b100 : 0);
  }
  static constexpr unsigned lerped_states(unsigned variant) {
    return variant & CENTERED ? 0b100 : 0;
  }
  static constexpr bool decays_grad(unsigned variant) { return variant & WEIGHT_DECAY; }

  struct Options {
    double lr, alpha, eps, weight_decay, momentum, centered;
  };
  static unsigned variant(const Options& o) {
    return (o.weight_decay != 0 ? WEIGHT_DECAY : 0u) | (o.momentum > 0 ? MOMENTUM : 0u) |
           (o.centered != 0 ? CENTERED : 0u);
  }

  template <class T>
  struct Hypers {
    T lr, alpha, alpha_comp, eps, weight_decay, momentum;
  };
  static Hypers<double> prepare(const Options& o, double /*step*/) {
    return {o.lr, o.alpha, 1 - o.alpha, o.eps, o.weight_decay, o.momentum};
  }

  template <unsigned VARIANT, class T>
  static inline void update(T& param, T grad, T& square_avg, T& momentum_buffer, T& grad_avg,
                            const Hypers<T>& h) {
    if constexpr (VARIANT & WEIGHT_DECAY) grad = grad + h.weight_decay * param;
    square_avg = h.alpha * square_avg + h.alpha_comp * grad * grad;
    T variance = square_avg;
    if constexpr (VARIANT & CENTERED) {
      grad_avg = lerp(grad_avg, grad, h.alpha_comp);
      variance = square_avg - grad_avg * grad_avg;
    }
    const T denom = std::sqrt(variance) + h.eps;
    if constexpr (VARIANT & MOMENTUM) {
      momentum_buffer = h.momentum * momentum_buffer + grad / denom;
      param = param - h.lr * momentum_buffer;
    } else {
      param = param - h.lr * grad / denom;
    }
  }
};

// Adam: Kingma, Ba 2015, algorithm 1 in the form of the end of section 2 (the bias corrections are
// folded into step_size and eps: one division and one rounding less per element than torch.optim).
// DECOUPLED is AdamW: Loshchilov, Hutter 2019, algorithm 2. AMSGRAD: Reddi, Kale, Kumar 2018.
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr const char* option_names[] = {
      "lr", "betas.0", "betas.1", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"};
  static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr const char* hyper_names[] = {
      "step_size", "beta1_comp", "beta2", "beta2_comp", "eps_hat", "weight_decay", "param_decay"};
  static constexpr unsigned FLAGS = 0b1100000;
  static constexpr unsigned SQUARES = 0b110;  // states like a second moment
  static constexpr bool has_step = true;

  enum : unsigned { WEIGHT_DECAY = 1, DECOUPLED = 2, AMSGRAD = 4, FIRST_STEP = 0, VARIANTS = 8 };
  static constexpr bool valid(unsigned variant) {
    return (variant & WEIGHT_DECAY) || !(variant & DECOUPLED);
  }
  static constexpr unsigned states(unsigned variant) { return variant & AMSGRAD ? 0b111 : 0b11; }
  static constexpr unsigned lerped_states(unsigned) { return 0b1; }
  static constexpr bool decays_grad(unsigned variant) {
    return (variant & (WEIGHT_DECAY | DECOUPLED)) == WEIGHT_DECAY;
  }

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay;
  };
  static unsigned variant(const Options& o) {
    return (o.weight_decay != 0 ? WEIGHT_DECAY : 0u) |
           (o.weight_decay != 0 && o.decoupled_weight_decay != 0 ? DECOUPLED : 0u) |
           (o.amsgrad != 0 ? AMSGRAD : 0u);
  }

  template <class T>
  struct Hypers {
    T step_size, beta1_comp, beta2, beta2_comp, eps_hat, weight_decay, param_decay;
  };
  static Hypers<double> prepare(const Options& o, double step) {
    const double bias_correction1 = 1 - integer_power(o.beta1, step);
    const double bias_correction2_sqrt = std::sqrt(1 - integer_power(o.beta2, step));
    return {o.lr / bias_correction1 * bias_correction2_sqrt,
            1 - o.beta1,
            o.beta2,
            1 - o.beta2,
            o.eps * bias_correction2_sqrt,
            o.weight_decay,
            1 - o.lr * o.weight_decay};
  }

  template <unsigned VARIANT, class T>
  static inline void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq,
                            const Hypers<T>& h) {
    if constexpr (VARIANT & DECOUPLED)
      param = param * h.param_decay;
    else if constexpr (VARIANT & WEIGHT_DECAY)
      grad = grad + h.weight_decay * param;
    exp_avg = lerp(exp_avg, grad, h.beta1_comp);
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_comp * grad * grad;
    T second_moment = exp_avg_sq;
    if constexpr (VARIANT & AMSGRAD) {
      // torch.maximum: a NaN on either side stays.
      const bool keep = max_exp_avg_sq > exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq;
      max_exp_avg_sq = keep ? max_exp_avg_sq : exp_avg_sq;
      second_moment = max_exp_avg_sq;
    }
    param = param - h.step_size * exp_avg / (std::sqrt(second_moment) + h.eps_hat);
  }
};

// The registry: one line per rule, here and nowhere else in csrc.
#define FUSED_OPTIM_RULES(RULE) RULE(SGD) RULE(Lion) RULE(Adagrad) RULE(RMSprop) RULE(Adam)
