// Every update rule, simplest first. A rule is arithmetic on one element: it knows no pointer,
// dtype, thread or storage format. It names its states (keys of optimizer.state[param]) and has
// - OPTIONS: what a param group says, as doubles
// - SCALARS: numbers of one param that each step advances, as doubles: how many steps it has seen
// - optional_states: those that these options bring
// - HYPERS: the numbers that one element needs, all of type T
// - advance: Scalars before the step -> after it
// - prepare: Options and Scalars after the step -> Hypers, in double, once per tensor
// - update: one element; grad is already unscaled and, if maximizing, negated. Bit i of THERE:
// there
//   is state i, known at compile time. All other choices are hypers.
//
// Included inside a namespace, after arithmetic.h: each instruction set compiles its own copy (see
// apply.inl). The order of operations is torch.optim's non-fused code's unless a comment says
// otherwise.
// Keys of a param group, and numbers that an element needs: a struct of these members, and their
// names in one string. The option beta1 is the first item of group["betas"]. Scalars are float32 or
// float64 tensors among the states, `step` first.
#define OPTIONS(...)    \
  struct Options {      \
    double __VA_ARGS__; \
  };                    \
  static constexpr const char* option_names = #__VA_ARGS__

#define SCALARS(...)    \
  struct Scalars {      \
    double __VA_ARGS__; \
  };                    \
  static constexpr const char* scalar_names = #__VA_ARGS__

#define HYPERS(...)  \
  template <class T> \
  struct Hypers {    \
    T __VA_ARGS__;   \
  };                 \
  static constexpr const char* hyper_names = #__VA_ARGS__

// The dtypes of a param's scalars: torch.optim multiplies a float32 one by a float32, and makes new
// ones in the default dtype, which `step` shows, as load_state_dict leaves that alone.
struct ScalarTypes {
  bool step_is_float32, last_is_float32;
};
inline double rounded(double value, bool to_float32) {
  return to_float32 ? static_cast<float>(value) : value;
}

// Defaults, which a rule replaces where it differs.
struct Rule {
  static constexpr unsigned FLAGS = 0;                      // bit i: option i is true or false
  static constexpr StateKind state_kinds[MAX_STATES] = {};  // SIGNED
  SCALARS(step);
  static constexpr bool has_step = true;  // false: `step` is among the states for random bits alone
  // Bit i: scalar i is not among the states. Before the step it is 0 if those do not exist yet, and
  // 1 if they do; where a device alone knows that, a tensor on the device that the host keeps.
  static constexpr unsigned HIDDEN = 0;
  template <class Options>
  static void advance(const Options&, Scalars& s, ScalarTypes) {
    s.step += 1;
  }
  // True: prepare takes the Scalars before the step.
  static constexpr bool PREPARES_BEFORE = false;
  // True: torch.optim takes betas that are tensors of one element and any shape.
  static constexpr bool TAKES_TENSORS = false;
  static constexpr unsigned OPTIONAL = 0;  // bit i: options decide whether there is state i
  template <class Options>
  static unsigned optional_states(const Options&) {
    return 0;
  }
  static constexpr unsigned LERPED = 0;       // bit i: torch.lerp_ writes state i
  static constexpr bool INTERLEAVES = false;  // kernels of its own: interleaved.h
  template <class Options>
  static bool decays_grad(const Options&) {  // adds weight_decay * param
    return false;
  }
};

template <class Rule>
constexpr unsigned all_states() {
  return (1u << sizeof(Rule::state_names) / sizeof(*Rule::state_names)) - 1;
}

// What weight decay leaves of a param. Without it 1, whatever lr is.
inline double param_decay_of(double lr, double weight_decay) {
  return weight_decay != 0 ? 1 - lr * weight_decay : 1;
}

// The weight decay that the grad takes, and what the other one leaves of a param.
struct WeightDecays {
  template <class Options>
  explicit WeightDecays(const Options& o) {
    const double of_param = o.decoupled_weight_decay != 0 ? o.weight_decay : 0;
    grad = o.weight_decay - of_param;
    param_decay = param_decay_of(o.lr, of_param);
  }
  double grad, param_decay;
};

// SGD with momentum as in Sutskever et al. 2013, "On the importance of initialization and momentum
// in deep learning", in torch.optim's form: the learning rate multiplies the buffer, not the grad.
struct SGD : Rule {
  static constexpr const char* name = "sgd";
  OPTIONS(lr, momentum, dampening, weight_decay, nesterov);
  static constexpr const char* state_names[] = {"momentum_buffer"};
  HYPERS(lr, momentum, dampening_comp, weight_decay, nesterov, first_step);
  static constexpr unsigned FLAGS = 0b10000;
  SCALARS(step, momentum_step);
  static constexpr bool has_step = false;
  static constexpr unsigned HIDDEN = 0b10;
  static constexpr unsigned OPTIONAL = 0b1;

  static unsigned optional_states(const Options& o) { return o.momentum != 0 ? 0b1 : 0; }
  static bool decays_grad(const Options& o) { return o.weight_decay != 0; }
  static void advance(const Options&, Scalars& s, ScalarTypes) {
    s.step += 1;
    s.momentum_step += 1;
  }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    const double first_step = s.momentum_step == 1 ? 1 : 0;
    return {o.lr, o.momentum, 1 - o.dampening, o.weight_decay, o.nesterov, first_step};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& momentum_buffer, T&, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    if constexpr (THERE & 0b1) {
      const T blended = h.momentum * momentum_buffer + h.dampening_comp * grad;
      momentum_buffer = h.first_step != 0 ? grad : blended;
      const T ahead = grad + h.momentum * momentum_buffer;
      grad = h.nesterov != 0 ? ahead : momentum_buffer;
    }
    param = param - h.lr * grad;
  }
};

// Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2, in the order of
// the authors' PyTorch code.
struct Lion : Rule {
  static constexpr const char* name = "lion";
  static constexpr bool TAKES_TENSORS = true;
  OPTIONS(lr, beta1, beta2, weight_decay);
  static constexpr const char* state_names[] = {"exp_avg"};
  HYPERS(lr, beta1, beta1_comp, beta2, beta2_comp, param_decay);
  static constexpr bool has_step = false;
  static Hypers<double> prepare(const Options& o, const Scalars&) {
    return {o.lr, o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2, param_decay_of(o.lr, o.weight_decay)};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& exp_avg, T&, T&, const Hypers<T>& h) {
    param = param * h.param_decay;
    const T direction = h.beta1 * exp_avg + h.beta1_comp * grad;
    param = param - h.lr * sign(direction);
    exp_avg = h.beta2 * exp_avg + h.beta2_comp * grad;
  }
};

// Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging", with Bottou's
// schedule of the learning rate, in torch.optim's form: eta and mu are those that the step before
// has made.
struct ASGD : Rule {
  static constexpr const char* name = "asgd";
  OPTIONS(lr, lambd, alpha, t0, weight_decay);
  static constexpr const char* state_names[] = {"ax"};
  static constexpr StateKind state_kinds[MAX_STATES] = {EXACT};
  SCALARS(step, eta, mu);
  HYPERS(eta, param_decay, mu, weight_decay);
  static constexpr bool PREPARES_BEFORE = true;
  static bool decays_grad(const Options& o) { return o.weight_decay != 0; }
  static void advance(const Options& o, Scalars& s, ScalarTypes types) {
    s.step += 1;
    const double eta = o.lr / power(1 + o.lambd * o.lr * s.step, o.alpha);
    s.eta = rounded(eta, types.step_is_float32);
    s.mu = rounded(1 / maximum(1.0, s.step - o.t0), types.step_is_float32);
  }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    return {s.eta, 1 - o.lambd * s.eta, s.mu, o.weight_decay};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& ax, T&, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    param = param * h.param_decay - h.eta * grad;
    ax = h.mu == 1 ? param : ax + (param - ax) * h.mu;
  }
};

// Duchi, Hazan, Singer 2011, "Adaptive subgradient methods", diagonal form.
struct Adagrad : Rule {
  static constexpr const char* name = "adagrad";
  OPTIONS(lr, lr_decay, eps, weight_decay);
  static constexpr const char* state_names[] = {"sum"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SQUARE};
  HYPERS(decayed_lr, eps, weight_decay);
  static bool decays_grad(const Options& o) { return o.weight_decay != 0; }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    return {o.lr / (1 + (s.step - 1) * o.lr_decay), o.eps, o.weight_decay};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& sum, T&, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    sum = sum + grad * grad;
    param = param - h.decayed_lr * grad / (std::sqrt(sum) + h.eps);
  }
};

// Zeiler 2012, "ADADELTA: An adaptive learning rate method", algorithm 1.
struct Adadelta : Rule {
  static constexpr const char* name = "adadelta";
  OPTIONS(lr, rho, eps, weight_decay);
  static constexpr const char* state_names[] = {"square_avg", "acc_delta"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SQUARE, SQUARE};
  HYPERS(lr, rho, rho_comp, eps, weight_decay);
  static bool decays_grad(const Options& o) { return o.weight_decay != 0; }
  static Hypers<double> prepare(const Options& o, const Scalars&) {
    return {o.lr, o.rho, 1 - o.rho, o.eps, o.weight_decay};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& square_avg, T& acc_delta, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    square_avg = h.rho * square_avg + h.rho_comp * grad * grad;
    const T delta = std::sqrt(acc_delta + h.eps) / std::sqrt(square_avg + h.eps) * grad;
    acc_delta = h.rho * acc_delta + h.rho_comp * delta * delta;
    param = param - h.lr * delta;
  }
};

// Hinton's lecture 6e (2012); centered as in Graves 2013, "Generating sequences with recurrent
// neural networks"; eps is added after the square root, as in torch.optim.
struct RMSprop : Rule {
  static constexpr const char* name = "rmsprop";
  OPTIONS(lr, alpha, eps, weight_decay, momentum, centered);
  static constexpr const char* state_names[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SQUARE};
  HYPERS(lr, alpha, alpha_comp, eps, weight_decay, momentum);
  static constexpr unsigned FLAGS = 0b100000;
  static constexpr unsigned OPTIONAL = 0b110;
  static constexpr unsigned LERPED = 0b100;

  static unsigned optional_states(const Options& o) {
    return (o.momentum > 0 ? 0b10 : 0) | (o.centered != 0 ? 0b100 : 0);
  }
  static bool decays_grad(const Options& o) { return o.weight_decay != 0; }
  static Hypers<double> prepare(const Options& o, const Scalars&) {
    return {o.lr, o.alpha, 1 - o.alpha, o.eps, o.weight_decay, o.momentum};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& square_avg, T& momentum_buffer, T& grad_avg,
                            const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    square_avg = h.alpha * square_avg + h.alpha_comp * grad * grad;
    T variance = square_avg;
    if constexpr (THERE & 0b100) {
      grad_avg = lerp(grad_avg, grad, h.alpha_comp);
      variance = square_avg - grad_avg * grad_avg;
    }
    const T denom = std::sqrt(variance) + h.eps;
    if constexpr (THERE & 0b10) {
      momentum_buffer = h.momentum * momentum_buffer + grad / denom;
      param = param - h.lr * momentum_buffer;
    } else {
      param = param - h.lr * grad / denom;
    }
  }
};

// Riedmiller, Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP
// algorithm", without weight backtracking, in torch.optim's form. lr is where step_size starts.
struct Rprop : Rule {
  static constexpr const char* name = "rprop";
  OPTIONS(lr, eta1, eta2, step_size1, step_size2);
  static constexpr const char* state_names[] = {"prev", "step_size"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SIGNED, EXACT};
  HYPERS(etaminus, etaplus, smallest, largest);
  static Hypers<double> prepare(const Options& o, const Scalars&) {
    return {o.eta1, o.eta2, o.step_size1, o.step_size2};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& prev, T& step_size, T&, const Hypers<T>& h) {
    // In variables: GCC does not vectorise what it may have to leave out, such as reading a hyper.
    const T etaminus = h.etaminus, etaplus = h.etaplus, smallest = h.smallest, largest = h.largest;
    const T change = grad * prev;
    const T factor = change > 0 ? etaplus : T(1);
    step_size = step_size * (change < 0 ? etaminus : factor);
    // torch.clamp: a NaN stays, and the upper end counts if they cross.
    step_size = step_size < smallest ? smallest : step_size;
    step_size = step_size > largest ? largest : step_size;
    prev = change < 0 ? T(0) : grad;
    param = param - sign(prev) * step_size;
  }
};

// Kingma, Ba 2015, "Adam: A method for stochastic optimization", algorithm 2, with eps as in
// torch.optim.
struct Adamax : Rule {
  static constexpr const char* name = "adamax";
  OPTIONS(lr, beta1, beta2, eps, weight_decay);
  static constexpr const char* state_names[] = {"exp_avg", "exp_inf"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SIGNED, SQUARE};
  HYPERS(step_size, beta1_comp, beta2, eps, weight_decay);
  static constexpr unsigned LERPED = 0b1;
  static bool decays_grad(const Options& o) { return o.weight_decay != 0; }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    return {o.lr / (1 - integer_power(o.beta1, s.step)), 1 - o.beta1, o.beta2, o.eps,
            o.weight_decay};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& exp_avg, T& exp_inf, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    exp_avg = lerp(exp_avg, grad, h.beta1_comp);
    exp_inf = maximum(h.beta2 * exp_inf, std::abs(grad) + h.eps);
    param = param - h.step_size * exp_avg / exp_inf;
  }
};

// Adam: Kingma, Ba 2015, algorithm 1 in the form of the end of section 2 (the bias corrections are
// folded into step_size and eps: one division and one rounding less per element than torch.optim).
// With decoupled weight decay AdamW: Loshchilov, Hutter 2019, algorithm 2. amsgrad: Reddi, Kale,
// Kumar 2018.
struct Adam : Rule {
  static constexpr const char* name = "adam";
  static constexpr bool TAKES_TENSORS = true;
  OPTIONS(lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay);
  static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SIGNED, SQUARE, SQUARE};
  HYPERS(step_size, beta1_comp, beta2, beta2_comp, eps_hat, weight_decay, param_decay);
  static constexpr unsigned FLAGS = 0b1100000;
  static constexpr unsigned OPTIONAL = 0b100;
  static constexpr unsigned LERPED = 0b1;
  static constexpr bool INTERLEAVES = true;

  static unsigned optional_states(const Options& o) { return o.amsgrad != 0 ? 0b100 : 0; }
  static bool decays_grad(const Options& o) { return WeightDecays(o).grad != 0; }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    const WeightDecays decay(o);
    const double bias_correction1 = 1 - integer_power(o.beta1, s.step);
    const double bias_correction2_sqrt = std::sqrt(1 - integer_power(o.beta2, s.step));
    return {o.lr / bias_correction1 * bias_correction2_sqrt,
            1 - o.beta1,
            o.beta2,
            1 - o.beta2,
            o.eps * bias_correction2_sqrt,
            decay.grad,
            decay.param_decay};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq,
                            const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    param = param * h.param_decay;
    exp_avg = lerp(exp_avg, grad, h.beta1_comp);
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_comp * grad * grad;
    T second_moment = exp_avg_sq;
    if constexpr (THERE & 0b100) {
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }
    param = param - h.step_size * exp_avg / (std::sqrt(second_moment) + h.eps_hat);
  }
};

// Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", algorithm 2.
struct RAdam : Rule {
  static constexpr const char* name = "radam";
  OPTIONS(lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay);
  static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SIGNED, SQUARE};
  HYPERS(step_size, beta1_comp, beta2, beta2_comp, eps, weight_decay, param_decay, rectified);
  static constexpr unsigned FLAGS = 0b100000;
  static constexpr unsigned LERPED = 0b1;
  static bool decays_grad(const Options& o) { return WeightDecays(o).grad != 0; }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    const WeightDecays decay(o);
    const double power2 = integer_power(o.beta2, s.step), bias_correction2 = 1 - power2;
    const double rho_inf = 2 / (1 - o.beta2) - 1;
    const double rho_t = rho_inf - 2 * s.step * power2 / bias_correction2;
    const double step_size = o.lr / (1 - integer_power(o.beta1, s.step));
    const bool rectified = rho_t > 5;
    // The variance's rectification and bias correction.
    const double factor =
        std::sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)) *
        std::sqrt(bias_correction2);
    return {rectified ? step_size * factor : step_size,
            1 - o.beta1,
            o.beta2,
            1 - o.beta2,
            o.eps,
            decay.grad,
            decay.param_decay,
            rectified ? 1.0 : 0.0};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    param = param * h.param_decay;
    exp_avg = lerp(exp_avg, grad, h.beta1_comp);
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_comp * grad * grad;
    const T root = std::sqrt(exp_avg_sq) + h.eps;  // always: see Rprop
    param = param - h.step_size * exp_avg / (h.rectified != 0 ? root : T(1));
  }
};

// Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2 with its schedule of the
// momentum; folded as Adam is, and with one division.
struct NAdam : Rule {
  static constexpr const char* name = "nadam";
  OPTIONS(lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay);
  static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateKind state_kinds[MAX_STATES] = {SIGNED, SQUARE};
  SCALARS(step, mu_product);
  HYPERS(grad_size, avg_size, beta1_comp, beta2, beta2_comp, eps_hat, weight_decay, param_decay);
  static constexpr unsigned FLAGS = 0b1000000;
  static constexpr unsigned LERPED = 0b1;
  static bool decays_grad(const Options& o) { return WeightDecays(o).grad != 0; }
  static double mu(const Options& o, double step) {
    return o.beta1 * (1 - 0.5 * power(0.96, step * o.momentum_decay));
  }
  static void advance(const Options& o, Scalars& s, ScalarTypes types) {
    s.step += 1;
    s.mu_product *= rounded(mu(o, s.step), types.last_is_float32);
  }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    const WeightDecays decay(o);
    const double bias_correction2_sqrt = std::sqrt(1 - integer_power(o.beta2, s.step));
    const double step_size = o.lr * bias_correction2_sqrt, mu_next = mu(o, s.step + 1);
    return {step_size * (1 - mu(o, s.step)) / (1 - s.mu_product),
            step_size * mu_next / (1 - s.mu_product * mu_next),
            1 - o.beta1,
            o.beta2,
            1 - o.beta2,
            o.eps * bias_correction2_sqrt,
            decay.grad,
            decay.param_decay};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T&, const Hypers<T>& h) {
    if (h.weight_decay != 0) grad = grad + h.weight_decay * param;
    param = param * h.param_decay;
    exp_avg = lerp(exp_avg, grad, h.beta1_comp);
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_comp * grad * grad;
    param =
        param - (h.grad_size * grad + h.avg_size * exp_avg) / (std::sqrt(exp_avg_sq) + h.eps_hat);
  }
};

// Pagliardini, Ablin, Grangier 2024, "The AdEMAMix optimizer: better, faster, older", algorithm 1,
// folded as Adam is.
struct AdEMAMix : Rule {
  static constexpr const char* name = "ademamix";
  OPTIONS(lr, beta1, beta2, beta3, alpha, alpha_warmup, beta3_warmup, eps, weight_decay);
  static constexpr const char* state_names[] = {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"};
  // A step takes a ten-thousandth of the grad into the slow average: fewer bits would lose it.
  static constexpr StateKind state_kinds[MAX_STATES] = {SIGNED, EXACT, SQUARE};
  HYPERS(fast_size, slow_size, beta1_comp, beta3_comp, beta2, beta2_comp, eps_hat, param_decay);
  static constexpr unsigned LERPED = 0b11;

  // In steps: beta**half_life == 1 / 2.
  static double half_life(double beta) { return beta > 0 ? -1 / log2_of(beta) : 0; }
  // From beta1 on, whose half-life grows to that of beta3 in equal steps.
  static double beta3_at(const Options& o, double step) {
    if (!(step < o.beta3_warmup)) return o.beta3;
    const double share = step / o.beta3_warmup;
    return exp2_of(-1 / ((1 - share) * half_life(o.beta1) + share * half_life(o.beta3)));
  }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    const double alpha = s.step < o.alpha_warmup ? s.step / o.alpha_warmup * o.alpha : o.alpha;
    const double bias_correction2_sqrt = std::sqrt(1 - integer_power(o.beta2, s.step));
    const double step_size = o.lr * bias_correction2_sqrt;
    return {step_size / (1 - integer_power(o.beta1, s.step)),
            step_size * alpha,
            1 - o.beta1,
            1 - beta3_at(o, s.step),
            o.beta2,
            1 - o.beta2,
            o.eps * bias_correction2_sqrt,
            param_decay_of(o.lr, o.weight_decay)};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& exp_avg_fast, T& exp_avg_slow, T& exp_avg_sq,
                            const Hypers<T>& h) {
    param = param * h.param_decay;
    exp_avg_fast = lerp(exp_avg_fast, grad, h.beta1_comp);
    exp_avg_slow = lerp(exp_avg_slow, grad, h.beta3_comp);
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_comp * grad * grad;
    const T direction = h.fast_size * exp_avg_fast + h.slow_size * exp_avg_slow;
    param = param - direction / (std::sqrt(exp_avg_sq) + h.eps_hat);
  }
};

// Defazio et al. 2024, "The road less scheduled", algorithm 1, in the authors' form, folded as Adam
// is: the param is y, where grads are taken; x, their average, is not kept.
struct AdamWScheduleFree : Rule {
  static constexpr const char* name = "adamw_schedule_free";
  OPTIONS(lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power);
  static constexpr const char* state_names[] = {"z", "exp_avg_sq"};
  static constexpr StateKind state_kinds[MAX_STATES] = {EXACT, SQUARE};
  SCALARS(step, lr_max, weight_sum);
  HYPERS(grad_size, beta2, beta2_comp, eps_hat, weight_decay, z_weight, y_size, lr);

  static double lr_at(const Options& o, double step) {
    return step < o.warmup_steps ? step / o.warmup_steps * o.lr : o.lr;
  }
  static double power_of_lr(const Options& o, double lr) {
    return lr == 0 && o.weight_lr_power > 0 ? 0 : lr == 0 ? 1 : power(lr, o.weight_lr_power);
  }
  // What z of this step counts in x.
  static double weight_of(const Options& o, const Scalars& s) {
    return power(s.step, o.r) * power_of_lr(o, s.lr_max);
  }
  static void advance(const Options& o, Scalars& s, ScalarTypes types) {
    s.step += 1;
    const double lr = lr_at(o, s.step);
    s.lr_max = rounded(s.lr_max > lr ? s.lr_max : lr, types.last_is_float32);
    s.weight_sum += weight_of(o, s);
  }
  static Hypers<double> prepare(const Options& o, const Scalars& s) {
    const double bias_correction2_sqrt = std::sqrt(1 - integer_power(o.beta2, s.step));
    const double lr = lr_at(o, s.step);
    const double z_weight = s.weight_sum != 0 ? weight_of(o, s) / s.weight_sum : 0;
    return {bias_correction2_sqrt,
            o.beta2,
            1 - o.beta2,
            o.eps * bias_correction2_sqrt,
            o.weight_decay,
            z_weight,
            lr * (o.beta1 * (1 - z_weight) - 1),
            lr};
  }

  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& z, T& exp_avg_sq, T&, const Hypers<T>& h) {
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_comp * grad * grad;
    T direction = h.grad_size * grad / (std::sqrt(exp_avg_sq) + h.eps_hat);
    if (h.weight_decay != 0) direction = direction + h.weight_decay * param;
    param = lerp(param, z, h.z_weight) + h.y_size * direction;
    z = z - h.lr * direction;
  }
};

// The registry: one line per rule, here and nowhere else in csrc.
#define FUSED_OPTIM_RULES(RULE) \
  RULE(SGD)                     \
  RULE(Lion)                    \
  RULE(ASGD)                    \
  RULE(Adagrad)                 \
  RULE(Adadelta)                \
  RULE(RMSprop)                 \
  RULE(Rprop) RULE(Adamax) RULE(Adam) RULE(RAdam) RULE(NAdam) RULE(AdEMAMix) RULE(AdamWScheduleFree)
