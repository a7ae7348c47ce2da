// Kernels for states that all have 8 bits, or all are bfloat16, beside params and grads of float32,
// or of bfloat16 with split8, without averages (bfloat16 outputs of float32 params excepted): loops
// with nothing to choose in them. While the rule divides in one block of elements, an earlier one
// is rounded and packed, register by register: a CPU does both at once. Same bits as Packed, 20 to
// 30% faster (2 threads of an Intel Xeon). Included inside a namespace, by apply.inl.

struct EightBits {
  static constexpr bool have_scales = true;
  template <StateKind KIND>
  using codec = std::conditional_t<KIND == SQUARE, Root8, Signed8>;
};
struct SixteenBits {
  static constexpr bool have_scales = false;
  template <StateKind KIND>
  using codec = std::conditional_t<KIND == SQUARE, RandomBF16, NearestBF16>;
};

struct Float32Param {
  static constexpr Dtype dtype = F32;
  static constexpr Storage storage = PLAIN;
  // Where the rule works on a tile of the param.
  static inline float* place(const Slice& slice, int64_t i, float*) {
    return at<float>(slice, PARAM, i);
  }
  static inline Floats load_grad(const Slice& slice, int64_t i) {
    return load_floats(at<float>(slice, GRAD, i));
  }
};

struct Split8Param {
  static constexpr Dtype dtype = BF16;
  static constexpr Storage storage = SPLIT8;
  static inline float* place(const Slice& slice, int64_t i, float* buffer) {
    for (int k = 0; k < TILE; k += LANES) {
      const Bits upper = Bits(load_wide(at<uint16_t>(slice, PARAM, i + k)) << 16);
      const Bits rest = Bits(load_wide(static_cast<const int8_t*>(slice.remainder) + i + k) << 8);
      // What valid_rest leaves out makes the sum negative, or not finite.
      const Bits sum = (upper & MAGNITUDE) + rest;
      const Bits whole = sum >= 0x7f7f8000u ? upper : upper + rest;
      std::memcpy(buffer + k, &whole, sizeof(whole));
    }
    return buffer;
  }
  static inline Floats load_grad(const Slice& slice, int64_t i) {
    return Floats(load_wide(at<uint16_t>(slice, GRAD, i)) << 16);
  }
};

template <class Rule, unsigned THERE, class Param, class States>
struct Interleaved {
  using Hypers = typename Rule::template Hypers<float>;
  static constexpr int N = SCALE_BLOCK, GROUP = 4 * LANES, AHEAD = 512;
  static constexpr bool splits = Param::storage == SPLIT8;

  static bool serves(const Slice& slice) {
    const Packing& packing = *slice.packing;
    const bool no_average = slice.streams[EMA] == nullptr;
    const bool output = !splits && slice.ema_weight == 1 && slice.dtypes[EMA] == BF16;
    bool all = slice.numel >= N && slice.grad_write == KEPT && (no_average || output) &&
               packing.offset % N == 0 && packing.storage[GRAD] == PLAIN &&
               packing.storage[PARAM] == Param::storage && slice.dtypes[PARAM] == Param::dtype &&
               slice.dtypes[GRAD] == Param::dtype;
    each_state([&](auto s) {
      all = all && packing.storage[STATES + s] == codec<s>::storage &&
            slice.dtypes[STATES + s] == codec<s>::dtype;
    });
    return all;
  }

  // Steps full blocks, `full` elements.
  static void run(const Slice& slice, int64_t full, float factor, const Hypers& h) {
    if (factor == 1 && h.weight_decay == 0)
      run<true>(slice, full, factor, h);
    else
      run<false>(slice, full, factor, h);
  }

 private:
  template <int S>
  using codec = typename States::template codec<Rule::state_kinds[S]>;

  // A block that is not in memory yet.
  struct Block {
    alignas(64) float param[N], states[MAX_STATES][N];
    Ints largest[MAX_STATES];  // magnitudes, in each lane
    // Of two states: the first one's in the first half of the lanes.
    Ints largest_of_two[2];
    Floats inverse_of_two[2];
    float inverse(int s) const { return inverse_of_two[s / 2][s % 2 * LANES / 2]; }
    bool is_special(int s) const {
      return uint32_t(largest_of_two[s / 2][s % 2 * LANES / 2]) >= INF;
    }
  };
  // How a block is rounded, in registers, and what comes out, not packed.
  struct Rounding {
    Random param, states[MAX_STATES];
    float inverses[MAX_STATES] = {};
    Rounding(const Slice& slice, int64_t i, const Block& block)
        : param(random_at<Random>(slice, PARAM, i)),
          states{random_at<Random>(slice, STATES, i), random_at<Random>(slice, STATES + 1, i),
                 random_at<Random>(slice, STATES + 2, i)} {
      each_scaled([&](auto s) { inverses[s] = block.inverse(s); });
    }
  };
  struct Group {
    Ints codes[MAX_STATES][4], rests[4];
    Bits highs[4];
  };

  template <class F>
  [[gnu::always_inline]] static inline void each_scaled(const F& f) {
    if constexpr (States::have_scales) each_state(f);
  }
  template <class F>
  [[gnu::always_inline]] static inline void each_state(const F& f) {
    if constexpr (THERE & 0b001) f(std::integral_constant<int, 0>());
    if constexpr (THERE & 0b010) f(std::integral_constant<int, 1>());
    if constexpr (THERE & 0b100) f(std::integral_constant<int, 2>());
  }
  template <int S>
  static inline auto codes_at(const Slice& slice, int64_t i) {
    return at<typename codec<S>::Code>(slice, STATES + S, i);
  }

  // A sign of a scale: some codes of the block stand for NaN or an infinity.
  static inline bool has_special(const Slice& slice, int64_t i) {
    uint16_t signs = 0;
    each_scaled([&](auto s) { signs |= scale_at(slice, STATES + s, i); });
    return signs >> 15;
  }

  template <Dtype DTYPE>
  [[gnu::always_inline]] static inline void fetch(const void* stream, int64_t i) {
    for (int k = 0; k < N * ITEMSIZE[DTYPE]; k += 64) prefetch(stream, i * ITEMSIZE[DTYPE] + k);
  }

  // The rule, on the tile from the block's k-th element on, with its states in the block.
  [[gnu::always_inline]] static inline void make_tile(const Slice& slice, int64_t i, int k,
                                                      float factor, const Hypers& h, Block& block) {
    alignas(64) float grad[TILE];
    for (int j = 0; j < TILE; j += LANES) {
      const Floats some = Param::load_grad(slice, i + k + j);
      std::memcpy(grad + j, &some, sizeof(some));
    }
    update_tile<Rule, THERE, States::have_scales, TILE>(
        Param::place(slice, i + k, block.param + k), grad, factor, block.states[0] + k,
        block.states[1] + k, block.states[2] + k, h);
    for (int j = k; j < k + TILE; j += LANES)
      each_scaled([&](auto s) {
        const Ints magnitude = Ints(load_floats(block.states[s] + j)) & int32_t(MAGNITUDE);
        block.largest[s] = larger(block.largest[s], magnitude);
      });
  }

  // As scale_of.
  template <int S>
  [[gnu::always_inline]] static inline void scale_two(const Slice& slice, int64_t i, Block& block) {
    constexpr int NEXT = S + 1 < MAX_STATES && (THERE >> (S + 1) & 1) ? S + 1 : S;
    alignas(64) static constexpr Halves shares(codec<S>::share, codec<NEXT>::share),
        smallests(codec<S>::smallest, codec<NEXT>::smallest);
    const Ints largest =
        largest_lanes(block.largest[S], block.largest[NEXT], std::make_index_sequence<LANES>());
    const Floats exact = Floats(largest) * load_floats(shares.lanes);
    const Floats rounded = Floats((Bits(exact) + 0xffffu) & 0xffff0000u);
    const Floats smallest = load_floats(smallests.lanes);
    const Floats scale = rounded > smallest ? rounded : smallest;
    const Ints not_zero = largest != 0;
    block.largest_of_two[S / 2] = largest;
    block.inverse_of_two[S / 2] = Floats(Ints(1.0f / scale) & not_zero);
    const Shorts halves = Shorts(Ints(scale) & not_zero);
    scale_at(slice, STATES + S, i) = uint16_t(halves[1]);
    if (NEXT != S) scale_at(slice, STATES + NEXT, i) = uint16_t(halves[LANES + 1]);
  }
  struct Halves {
    float lanes[LANES] = {};
    constexpr Halves(float first, float second) {
      for (int k = 0; k < LANES; k++) lanes[k] = k < LANES / 2 ? first : second;
    }
  };
  [[gnu::always_inline]] static inline void scale(const Slice& slice, int64_t i, Block& block) {
    if constexpr (States::have_scales && (THERE & 0b011) != 0) scale_two<0>(slice, i, block);
    if constexpr (States::have_scales && (THERE & 0b100) != 0) scale_two<2>(slice, i, block);
  }

  [[gnu::always_inline]] static inline void round(const Rounding& rounding, int k,
                                                  const Block& block, Group& group, int part) {
    each_state([&](auto s) {
      group.codes[s][part] = codec<s>::code(load_floats(block.states[s] + k), rounding.inverses[s],
                                            [&] { return rounding.states[s](k); });
    });
    // Every NaN comes from a bfloat16 or is the default one.
    if constexpr (splits)
      SplitBF16<int8_t>::split<false>(load_floats(block.param + k), rounding.param(k),
                                      group.highs[part], group.rests[part]);
  }
  [[gnu::always_inline]] static inline void pack(const Slice& slice, int64_t i,
                                                 const Group& group) {
    each_state([&](auto s) { codec<s>::pack(group.codes[s], codes_at<s>(slice, i)); });
    if constexpr (splits) {
      uint16_t* const upper = at<uint16_t>(slice, PARAM, i);
      pack16(group.highs[0], group.highs[1], upper);
      pack16(group.highs[2], group.highs[3], upper + 2 * LANES);
      pack8(group.rests, static_cast<uint8_t*>(slice.remainder) + i);
    } else if (slice.streams[EMA] != nullptr) {
      encode_nearest_bf16<GROUP>(at<float>(slice, PARAM, i), at<uint16_t>(slice, EMA, i));
    }
  }
  static inline void write_special(const Slice& slice, int64_t i, const Block& block) {
    each_scaled([&](auto s) {
      if (block.is_special(s)) {
        constexpr Storage storage = codec<s>::storage;
        Packed::store_of<Random>(storage, F32)(slice, STATES + s, i, block.states[s]);
      }
    });
  }

  // A block's scales are made one block later, its codes two: what they need has long been
  // computed. AS_IS: the rule takes the grad as it is, which saves 5%.
  template <bool AS_IS>
  [[gnu::noinline]] static void run(const Slice& slice, int64_t full, float factor, Hypers h) {
    if (AS_IS) factor = 1, h.weight_decay = 0;  // the compiler sees it
    Block blocks[3];
    Block *block = blocks, *middle = blocks + 1, *last = blocks + 2;
    for (int64_t i = 0; i < full; i += N) {
      if (i < 2 * N || has_special(slice, i)) {
        make(slice, i, factor, h, *block);
        if (i >= N) scale(slice, i - N, *middle);
        if (i >= 2 * N) write(slice, i - 2 * N, *last);
      } else {
        step(slice, i, factor, h, *block, *middle, *last);
      }
      Block* const free = last;
      last = middle, middle = block, block = free;
    }
    if (full >= 2 * N) write(slice, full - 2 * N, *last);
    scale(slice, full - N, *middle);
    write(slice, full - N, *middle);
  }

  // `make` block i, `scale` the one before and `write` the one before that, interleaved.
  [[gnu::always_inline]] static inline void step(const Slice& slice, int64_t i, float factor,
                                                 const Hypers& h, Block& block, Block& middle,
                                                 const Block& last) {
    const Rounding rounding(slice, i - 2 * N, last);
    // 10 to 16% faster on 2 threads of an Intel Xeon. Always inline, see prefetch.
    fetch<Param::dtype>(slice.streams[PARAM], i + AHEAD);
    fetch<Param::dtype>(slice.streams[GRAD], i + AHEAD);
    each_state([&](auto s) __attribute__((always_inline)) {
      fetch<codec<s>::dtype>(slice.streams[STATES + s], i + AHEAD);
    });
    if (splits) fetch<I8>(slice.remainder, i + AHEAD);
    float sizes[MAX_STATES] = {};
    each_scaled([&](auto s) {
      sizes[s] = decode_bf16(scale_at(slice, STATES + s, i));
      block.largest[s] = Ints{};
    });
#pragma GCC unroll 4
    for (int from = 0; from < N; from += GROUP) {
      Group group;
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        const int k = from + part * LANES;
        if (k % TILE == 0) {
          for (int j = k; j < k + TILE; j += LANES)
            each_state([&](auto s) {
              const Floats some = codec<s>::value(load_wide(codes_at<s>(slice, i + j)), sizes[s]);
              std::memcpy(block.states[s] + j, &some, sizeof(some));
            });
          make_tile(slice, i, k, factor, h, block);
        }
        round(rounding, k, last, group, part);
      }
      pack(slice, i - 2 * N + from, group);
    }
    scale(slice, i - N, middle);
    write_special(slice, i - 2 * N, last);
  }
  [[gnu::noinline]] static void make(const Slice& slice, int64_t i, float factor, const Hypers& h,
                                     Block& block) {
    each_state([&](auto s) {
      Packed::load_of(codec<s>::storage, codec<s>::dtype)(slice, STATES + s, i, block.states[s]);
      block.largest[s] = Ints{};
    });
    for (int k = 0; k < N; k += TILE) make_tile(slice, i, k, factor, h, block);
  }
  [[gnu::noinline]] static void write(const Slice& slice, int64_t i, const Block& block) {
    const Rounding rounding(slice, i, block);
    for (int from = 0; from < N; from += GROUP) {
      Group group;
      for (int part = 0; part < 4; part++) round(rounding, from + part * LANES, block, group, part);
      pack(slice, i + from, group);
    }
    write_special(slice, i, block);
  }
};
