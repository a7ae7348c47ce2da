"""Every Triton kernel that there is to compile, and what its machine code has to be."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from triton import knobs
from triton.backends import backends as installed
from triton.backends.compiler import GPUTarget

from fused_optim.codegen.machine_code import WIDEST, Needs

# Setuptools maps the folder into the package; pyright cannot know.
from fused_optim.triton_kernels import specialize  # pyright: ignore[reportMissingImports]
from fused_optim.triton_kernels.multi_tensor import (  # pyright: ignore[reportMissingImports]
    KEPT,
    UNSCALED,
    ZEROED,
)
from fused_optim.triton_kernels.norm import (  # pyright: ignore[reportMissingImports]
    AHEAD,
    LANES,
)
from fused_optim.triton_kernels.rules import RULES  # pyright: ignore[reportMissingImports]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Storage types of param, grad and states.
DTYPES = {
    "float32": ("float32", "float32", "float32"),
    "float64": ("float64", "float64", "float64"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float16": ("float16", "float16", "float16"),
    "bfloat16, states float32": ("bfloat16", "bfloat16", "float32"),
    "float32, grad bfloat16": ("float32", "bfloat16", "float32"),
}
# What is packed: dtype of param and grad, storage of the param, type of the states.
PACKED = {
    "float32, states int8": ("float32", "plain", "int8"),
    "float32, states bfloat16": ("float32", "plain", "bfloat16"),
    "bfloat16 stochastic, states bfloat16": ("bfloat16", "stochastic", "bfloat16"),
    "bfloat16 split8, states int8": ("bfloat16", "split8", "int8"),
    "bfloat16 split16, states float32": ("bfloat16", "split16", "float32"),
    "float16 split8, states int8": ("float16", "split8", "int8"),
    "float16 split16, states bfloat16": ("float16", "split16", "bfloat16"),
}
REMAINDER_NBITS = {"split8": 8, "split16": 16}
# Of the 65,536 of a multiprocessor. With 64 per thread, 1,024 threads are resident, and the kernel with
# the fewest streams, SGD's param and grad, has 1,024 * 2 * 16 bytes = 32 KiB of loads in flight; an H100
# needs 3.35 TB/s * 1 us / 132 multiprocessors = 25 KB. In float64, 80 leave 768
# threads, and what takes as many has five streams: 768 * 5 * 16 bytes = 60 KiB.
MAX_REGISTERS = {"float32": 64, "float64": 80}
# Of all streams of 16 bits a thread has 8 elements: 640 threads * 32 bytes = 20 KiB for SGD.
MAX_REGISTERS_16 = 96
# Packed kernels compute more for each byte; registers leave at least so many bytes of loads in flight.
MIN_IN_FLIGHT_NBYTES = 20 * 1024
# Instructions of sm_90 per element of a whole block of float32, by rule; what a state adds that the options
# bring; what a stream adds that is stored in another way (Triton 3.9, measured by the command).
INSTRUCTIONS = {"sgd": 12.0, "lion": 26.0, "adagrad": 37.5, "rmsprop": 39.0, "adam": 43.5}
# Of other rules, for each byte that is moved: a quarter of what an H100 can issue meanwhile, which is
# 132 multiprocessors * 128 lanes * 1.7e9 / s / 3.35e12 bytes / s = 8.6.
INSTRUCTIONS_OF_BYTE = 2.1
INSTRUCTIONS_OF_STATE = {
    "momentum_buffer": {"sgd": 11.5, "rmsprop": 4.5},
    "grad_avg": {"rmsprop": 8.0},
    "max_exp_avg_sq": {"adam": 6.0},
}
INSTRUCTIONS_OF_STORAGE = {
    ("plain", "bfloat16"): 2.0,
    ("plain", "float16"): 1.0,
    ("stochastic", "bfloat16"): 10.0,
    ("signed8", "int8"): 10.0,
    ("root8", "uint8"): 24.0,
    ("split8", "bfloat16"): 20.0,
    ("split16", "bfloat16"): 11.5,
    ("split8", "float16"): 40.0,
    ("split16", "float16"): 47.0,
}
# A root that the rule does not take by itself: there is another state that it takes one of.
INSTRUCTIONS_OF_ROOT = 11.0
INSTRUCTIONS_TO_UNSCALE = 12.0
INSTRUCTIONS_OF_ONE_PASS = 10.0
# In float64, quotients and roots are routines of their own.
FLOAT64_INSTRUCTIONS = 1.9
INSTRUCTIONS_OF_NORM = {"float32": 3.4, "float64": 5.0, "bfloat16": 3.4, "float16": 3.4}  # sm_90
SLACK = 1.05


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile.

    Attributes:
        rule: key of RULES; or "norm" or "finish", the kernels that measure the grads.
        states: those of the rule's optional states that there are.
        dtypes: key of DTYPES or PACKED; None: this is the rule's `prepare`, or `finish`.
        scaled: with grad_scale and found_inf (`prepare`: with found_inf, and an EMA).
        one_pass: clips, averages and leaves zeros in the grads; grad_scale is part of clipping then.
    """

    rule: str
    states: tuple[str, ...]
    dtypes: str | None
    scaled: bool
    one_pass: bool = False

    @property
    def name(self) -> str:
        if self.rule not in RULES:
            return " ".join(filter(None, (self.rule, self.dtypes)))
        if self.dtypes is None:
            return f"{self.rule} prepare{', found_inf' if self.scaled else ''}"
        words = [self.rule, *(f"+{state}" for state in self.states), self.dtypes]
        name = " ".join(words) + (", scaled" if self.scaled else "")
        return name + (", one pass" if self.one_pass else "")

    @property
    def there(self) -> list[bool]:
        """Of each of the rule's states whether there is one."""
        absent = {*RULES[self.rule].optional_states} - {*self.states}
        return [state not in absent for state in RULES[self.rule].states]

    def specialization(self, target: str) -> specialize.Specialization:
        """Raises KeyError for `prepare` and `finish`, which have none."""
        rule = RULES[self.rule]
        there = self.there
        param_storage, storages = "plain", ["plain"] * len(there)
        if self.dtypes in PACKED:
            param, param_storage, state = PACKED[self.dtypes]
            grad = param
            of_state = {
                "int8": {"signed": "signed8", "square": "root8"},
                "bfloat16": {"square": "stochastic"},
                "float32": {},
            }[state]
            storages = [
                of_state.get(kind, "plain") if t else "plain" for kind, t in zip(rule.kinds, there)
            ]
            of_kind = {"square": "uint8" if state == "int8" else state, "exact": "float32"}
        else:
            param, grad, state = DTYPES[self.dtypes or ""]
            of_kind = {}
        states = tuple(
            of_kind.get(kind, state) if t else None for kind, t in zip(rule.kinds, there)
        )
        grad_write = ZEROED if self.one_pass else UNSCALED if self.scaled else KEPT
        return specialize.Specialization(
            self.rule,
            (param, grad, *states, param if self.one_pass else None),
            (param_storage, "plain", *storages, "plain"),
            grad_write.value,
            gpu_target(target).warp_size,
        )

    def needs(self, target: str) -> Needs:
        # The tree over the lanes, in float64; Triton 3.6 pads a little.
        tree = 2 * LANES.value * 8
        if self.dtypes is None:
            return Needs(max_shared_nbytes=tree if self.rule == "finish" else 0)
        bounded = target.startswith("sm_")
        if self.rule == "norm":
            at_once = AHEAD.value * (2 if self.dtypes == "float64" else 1)
            bound = MAX_REGISTERS["float32"] if bounded else None
            # In whole chunks, where AMD's compiler loads float32 one round ahead, and in those that are not.
            n_rounds = 2 if bounded or self.dtypes != "float32" else 3
            return Needs(
                {WIDEST: n_rounds * at_once},
                max_registers=bound,
                max_shared_nbytes=tree,
                elements=2 * at_once * WIDEST // specialize.NBITS[self.dtypes],
                max_instructions=SLACK * INSTRUCTIONS_OF_NORM[self.dtypes]
                if target == "sm_90"
                else None,
            )
        loads, stores = Counter[int](), Counter[int]()
        specialization = self.specialization(target)
        dtypes = specialization.dtypes
        compute = "float64" if "float64" in dtypes else "float32"
        # 128 bits of a thread in each part of a block, as far as dtypes are not mixed.
        is_packed = {*specialization.storages} != {"plain"}
        in_part = 2 if compute == "float64" else 4
        if not is_packed and {*dtypes} - {None} in ({"bfloat16"}, {"float16"}):
            in_part = 8
        elements = in_part * (2 if is_packed else 1)

        def add(accesses: Counter[int], nbits: int) -> None:
            """Of all elements of a thread: each part is an access of its own."""
            access = min(nbits * in_part, WIDEST)
            accesses[access] += nbits * elements // access

        for stream, dtype in enumerate(dtypes):
            if dtype is not None:
                add(loads, specialize.NBITS[dtype])
                # The grad is only written where it is unscaled.
                if stream != 1 or self.scaled:
                    add(stores, specialize.NBITS[dtype])
        # With an EMA there are as many streams as in float64, so the same number will do.
        bound = MAX_REGISTERS["float64" if self.one_pass else compute]
        if is_packed:
            remainder = REMAINDER_NBITS.get(specialization.storages[0])
            if remainder is not None:
                add(loads, remainder)
                add(stores, remainder)
            nbytes = sum(access * n for access, n in loads.items()) // 8
            # Warps of 32 threads, whose registers come in eights.
            n_warps = -(-MIN_IN_FLIGHT_NBYTES // (32 * nbytes))
            bound = min(65_536 // (32 * n_warps) // 8 * 8, 255)
            # Accesses of 32 bits or less are not told apart from those to the tables.
            loads, stores = ({n: a[n] for n in a if n > 32} for a in (loads, stores))
        elif in_part == 8:
            bound = MAX_REGISTERS_16
        return Needs(
            dict(loads),
            dict(stores),
            max_registers=bound if bounded else None,
            elements=elements,
            max_instructions=self.max_instructions(specialization) if bounded else None,
        )

    def max_instructions(self, specialization: specialize.Specialization) -> float:
        """Per element, with some more than was measured."""
        rule = RULES[self.rule]
        there = [s for s, t in zip(rule.states, self.there) if t]
        nbytes = 4 * (3 + 2 * len(there))
        n = INSTRUCTIONS.get(self.rule, INSTRUCTIONS_OF_BYTE * nbytes)
        n += sum(INSTRUCTIONS_OF_STATE.get(state, {}).get(self.rule, 0) for state in there)
        if specialization.compute is tl.float64:
            n *= FLOAT64_INSTRUCTIONS
        for storage, dtype in zip(specialization.storages, specialization.dtypes):
            if dtype is not None:
                n += INSTRUCTIONS_OF_STORAGE.get((storage, dtype), 0)
        if "root8" in specialization.storages and {"grad_avg", "max_exp_avg_sq"} & {*there}:
            n += INSTRUCTIONS_OF_ROOT
        if self.one_pass:
            n += INSTRUCTIONS_OF_ONE_PASS
        elif self.scaled:
            n += INSTRUCTIONS_TO_UNSCALE * (2 if specialization.compute is tl.float64 else 1)
        return SLACK * n


def select(
    rules: Sequence[str] | None, targets: Sequence[str] | None
) -> tuple[list[Kernel], list[str]]:
    """All kernels of the rules (None: of all), and the targets (None: TARGETS, if Triton can).

    Raises:
        ValueError: no such rule or target, or Triton is set up for its interpreter.
    """
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, which leaves nothing to compile")
    for rule in rules or ():
        if rule not in RULES:
            raise ValueError(f"--rule {rule!r}: there are {', '.join(RULES)}")
    for target in targets or ():
        if gpu_target(target).backend not in _backends():
            raise ValueError(f"--target {target!r}: not in Triton {triton.__version__}")
    targets = targets or [t for t in TARGETS if gpu_target(t).backend in _backends()]
    kernels = []
    for name in rules or RULES:
        optional = RULES[name].optional_states
        for n in range(len(optional) + 1):
            for states in itertools.combinations(optional, n):
                for dtypes, scaled in itertools.product(DTYPES, (False, True)):
                    kernels.append(Kernel(name, states, dtypes, scaled))
                kernels += [Kernel(name, states, packed, False) for packed in PACKED]
        kernels += [Kernel(name, (), None, scaled) for scaled in (False, True)]
        kernels.append(Kernel(name, (), "float32", True, one_pass=True))
    if rules is None:
        kernels += [Kernel("norm", (), dtype, False) for dtype in specialize.DTYPES]
        kernels.append(Kernel("finish", (), None, True))
    return kernels, list(targets)


def _backends() -> set[str]:
    return {{"nvidia": "cuda", "amd": "hip"}.get(name, name) for name in installed}


def gpu_target(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton wants it.

    Raises:
        ValueError: it is neither.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"--target {name!r} is neither like sm_90 nor like gfx942")
