# `make demo` and `make test` do everything on a fresh machine: Python 3.11 with venv, gcc and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A file's tests stay in one process: test_codegen.py compiles once for all of them.
PYTEST := $(BIN)/pytest -n auto --dist loadfile
INTERPRETED := FUSED_OPTIM_BACKEND=triton TRITON_INTERPRET=1
# The bits are compared with those of the C++ kernels, so what is proven of these needs no second proof.
# `make test INTERPRETED_TESTS=tests` takes hours.
# In test_amp.py, False has GradScaler unscale by itself: nothing new.
# Rules whose states are those of another one are compared where the rule itself is in question.
# GradScaler asks nothing of a rule.
INTERPRETED_TESTS := $(addprefix tests/gpu/test_triton_, bits.py one_pass.py prepare.py momentum.py formats.py \
  packed.py) tests/one_pass/test_amp.py tests/step/test_default_device.py \
  tests/lists/test_outputs.py::test_each_step_refreshes_them_and_changes_nothing_else \
  -k "not False and (triton_bits or triton_prepare or not (Adamax or RAdam or Adadelta or AdEMAMix or NAdam)) \
  and (not test_amp or AdamW or SGD)"

.PHONY: demo test test-native test-interpreted docs linkcheck formats lint sanitize sanitize-threads soak fuzz \
  triton-oldest deepspeed wheel torch aarch64 clean

# Run quietly: what pip and the compiler say is in the log, which is named when they fail.
LOG := build/install.log
quietly = { $(1); } >>$(LOG) 2>&1 || { tail -n 20 $(LOG); echo "Failed. $(LOG) has everything that was said." >&2; exit 1; }
pinned = $$(grep -E '^($(1))==' constraints.txt)
# What is imported is compiled to bytecode then, and kept: pip would compile everything, for a minute.
PIP := $(BIN)/pip install --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# What the demo needs. The package is installed while torch is downloaded: its kernels compile without torch, which is
# asked for by name, as this version has a CPU build; as a mere dependency it may come with gigabytes of CUDA libraries.
$(VENV)/demo: pyproject.toml setup.py constraints.txt $(wildcard csrc/*) $(wildcard csrc/isa/*)
	@mkdir -p build && : >$(LOG)
	@echo "installing into $(VENV): the kernels compile while torch is downloaded"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call quietly,$(PIP) -v --no-deps -e . & compiler=$$!; $(PIP) $(call pinned,torch) \
	  && $(PIP) -c constraints.txt $(call pinned,jinja2|matplotlib|psutil|rich|scikit-learn) && wait $$compiler && ls fused_optim/_C.*.so)
	@touch $@

# What tests, linters and pages need; the package itself is installed already. timm comes alone: of torchvision, which it
# asks for, there may be no build for this torch, and one that does not fit breaks transformers and lightning.
$(VENV)/installed: $(VENV)/demo
	@echo "installing what the tests need"
	@$(call quietly,$(PIP) -c constraints.txt 'fused-optim[dev]' && $(PIP) --no-deps $(call pinned,timm))
	@touch $@

demo: $(VENV)/demo
	$(BIN)/python -m fused_optim bench --quick --peers none --only gpt2-rmsprop small-cold
	$(BIN)/python examples/demo.py
	@echo 'Next: $(BIN)/fused-optim doctor, or your own model: $(BIN)/fused-optim bench --from train.py:make_model'

# Each worker has a core: threads that wait for one another made the tests three times as slow. Those that
# are about threads start as many as they need.
test-native test-interpreted triton-oldest sanitize sanitize-threads soak fuzz torch: export OMP_NUM_THREADS = 1

# Both halves run, whichever fails.
test:
	$(MAKE) --keep-going test-native test-interpreted

test-native: $(VENV)/installed
	$(PYTEST)

# The Triton kernels, in Triton's interpreter on CPU tensors.
test-interpreted: $(VENV)/installed
	$(INTERPRETED) $(BIN)/pytest -n auto -W ignore::RuntimeWarning:triton $(INTERPRETED_TESTS)

# The pages, in build/docs. What Sphinx warns of is an error: links between pages and into the API reference that
# lead nowhere, docstrings that it cannot read. tests/docs/test_docs_pages.py runs what the pages say.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# Links to other sites, which need the network.
linkcheck: $(VENV)/installed
	$(BIN)/python -m sphinx -q -b linkcheck docs build/linkcheck

# Bytes and accuracy of the state formats and masters: writes docs/formats.md in about ten minutes.
formats: $(VENV)/installed
	$(BIN)/python benchmarks/formats

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sh -c '$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/isa/*.* tests/*/*.cpp'
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pre-commit validate-config

# The oldest Triton of the package's range, beside the one that constraints.txt pins: every rule in float32.
OLDEST_TRITON := build/triton-oldest
triton-oldest: $(VENV)/installed
	test -d $(OLDEST_TRITON) || $(BIN)/pip install -q --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -c 'import triton; assert triton.__version__ == "3.6.0"'
	PYTHONPATH=$(OLDEST_TRITON) $(PYTEST) -q \
	  $(addprefix tests/gpu/test_, triton_launch.py codegen.py) tests/rules/test_registry.py \
	  -k "not codegen or kernel_is and sm_90 and (float32 or prepare) and not bfloat16"
	PYTHONPATH=$(OLDEST_TRITON) $(INTERPRETED) $(BIN)/pytest -n auto -q -W ignore::RuntimeWarning:triton \
	  tests/gpu/test_triton_bits.py -k layout

# DeepSpeed's ZeRO-Offload with our optimizer, two processes on gloo: not in CI, as its install and the kernel that it
# compiles take minutes.
DEEPSPEED := build/deepspeed
deepspeed: $(VENV)/installed
	test -d $(DEEPSPEED) || $(BIN)/pip install -q --no-deps --target $(DEEPSPEED) deepspeed==0.19.8 hjson ninja einops \
	  msgpack py-cpuinfo pydantic pydantic-core annotated-types typing-inspection
	DS_ACCELERATOR=cpu PYTHONWARNINGS=ignore PYTHONPATH=$(DEEPSPEED) $(BIN)/torchrun --nproc-per-node 2 tests/support/deepspeed_worker.py

# The wheel of one Python, in dist/: .venv's, or another's with make wheel FOR=python3.12. It serves every torch.
# Compiled kernels are taken as they are while no source is newer; other files of an earlier build are not. libstdc++ is
# linked dynamically: GCC 12's static one asks for glibc 2.36, the wheel without it for 2.34. Debian 12 gives a
# manylinux_2_34 wheel of 1.4 MB, the images of a release manylinux_2_28.
FOR ?= $(BIN)/python
TAG = $(shell $(FOR) -c 'import sys; print(sys.implementation.cache_tag)')
LIB = build/lib.$(shell $(FOR) -c 'import sysconfig; print(sysconfig.get_platform())')-$(TAG)
WHEELS = dist/*-$(subst cpython-,cp,$(TAG))-*.whl
REPAIR := $(shell sed -n 's/^repair-wheel-command = "\(.*\)"$$/\1/p' pyproject.toml)
wheel: $(VENV)/installed
	@test -n "$(TAG)" || { echo 'FOR=$(FOR) does not start.' >&2; exit 1; }
	rm -rf build/wheel/$(TAG) $(WHEELS)
	mkdir -p $(LIB)/fused_optim
	find $(LIB) -type f ! -name '_C.*.so' -delete
	find fused_optim -name '_C.$(TAG)-*.so' -exec cp -pu {} $(LIB)/fused_optim \;
	test -x build/$(TAG)/bin/python || $(FOR) -m venv build/$(TAG)
	@$(call quietly,build/$(TAG)/bin/pip wheel --no-deps --wheel-dir build/wheel/$(TAG) .)
	PATH=$(abspath $(BIN)):$$PATH && $(subst {dest_dir},dist,$(subst {wheel},build/wheel/$(TAG)/*.whl,$(REPAIR)))
	WHEEL=$$(ls $(WHEELS)) $(BIN)/pytest -q tests/around/test_wheel.py

# The tests of what depends on torch or on Python, with the wheel, on others of these: make torch VERSION=2.14.1
# FOR=python3.12. Not in CI: on x86-64 the package index has builds for CUDA alone, with gigabytes of libraries.
# PIP_CONSTRAINT: a configuration of pip may hold torch below VERSION.
TORCH = build/torch-$(VERSION)-$(TAG)
TORCH_TESTS := $(addprefix tests/,step $(addprefix rules/test_,numerics.py hypers.py registry.py) lists/test_functional.py \
  $(addprefix one_pass/test_,one_pass.py amp.py) formats/test_formats.py around/test_wheel.py)
torch: wheel
	@test -n "$(VERSION)" || { echo 'Which torch? make torch VERSION=2.14.1, say.' >&2; exit 1; }
	test -x $(TORCH)/bin/python || $(FOR) -m venv $(TORCH)
	$(TORCH)/bin/pip uninstall -q -y fused-optim
	@$(call quietly,PIP_CONSTRAINT=/dev/null $(TORCH)/bin/pip install --no-compile torch==$(VERSION) "$$(ls $(WHEELS))[test]")
	cd build && $(abspath $(TORCH))/bin/python -c \
	  'import fused_optim, sys; assert fused_optim.__file__.startswith(sys.prefix); fused_optim.show_config()'
	WHEEL=$$(ls $(WHEELS)) $(TORCH)/bin/pytest -n auto --dist loadfile -q $(TORCH_TESTS)

# The kernels for aarch64 in an emulator: their bits are those of this machine's, no operation is fused, and loops are
# vectorised. Not in CI, as all kernels are compiled once more, without Python.
aarch64: $(VENV)/installed
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static; } >/dev/null || { apt-get update -qq \
	  && apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user-static; }
	$(BIN)/python tests/aarch64/check.py

clean:
	rm -rf $(VENV) build dist *.egg-info fused_optim/*.so

# The tests of memory and surgery on kernels built with AddressSanitizer and UBSan: the baseline's, as in CI;
# ISA="avx2 avx512", say, or ISA=all for all that the machine has. The package is copied beside them and comes first on
# the path. Leak detection is off: Python itself never frees all.
ISA ?= baseline
ISAS = $(if $(filter all,$(ISA)),$$($(BIN)/python -c 'from fused_optim import _C; print(*_C.isas())'),$(ISA))
SANITIZED := build/sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1
SANITIZER_ENV = ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath $(SANITIZED)) \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)"
# Takes what sanitizers ask of the compiler, and of the linker.
build_sanitized = rm -rf $(SANITIZED) && CFLAGS="$(1)" CXXFLAGS="$(1)" LDFLAGS="$(1) $(2)" FUSED_OPTIM_BUILD_OPT=-O0 \
    FUSED_OPTIM_BUILD_BASELINE_ONLY=$(if $(filter-out baseline,$(ISA)),,1) \
    $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp build/temp.sanitized \
  && cp -r fused_optim/*.py fused_optim/bench fused_optim/cli fused_optim/codegen $(SANITIZED)/fused_optim/
is_sanitized := import fused_optim._C as c; assert "sanitized" in c.__file__, c.__file__
SANITIZED_TESTS := -k "not AdamW and not RAdam and not Adamax and not Adadelta and not Adagrad and not Rprop and not Lion"
sanitize: $(VENV)/installed
	$(call build_sanitized,$(SANITIZE))
	cd build && $(SANITIZER_ENV) $(abspath $(BIN))/python -c '$(is_sanitized)'
	set -e; for isa in $(ISAS); do FUSED_OPTIM_ISA=$$isa $(SANITIZER_ENV) $(BIN)/pytest -q -n auto $(SANITIZED_TESTS) \
	  tests/step/test_surgery.py::test_surgery_before_the_first_step \
	  tests/step/test_surgery.py::test_surgery_twice \
	  tests/step/test_aliasing.py tests/step/test_grads.py tests/step/test_bad_input.py \
	  tests/formats/test_formats_codec.py \
	  tests/formats/test_formats.py::test_layouts_go_to_the_kernels_or_around_them \
	  tests/formats/test_formats.py::test_a_format_may_be_changed_between_two_steps \
	  tests/formats/test_formats.py::test_copies_go_on_alike \
	  tests/one_pass/test_one_pass.py::test_layouts tests/one_pass/test_one_pass.py::test_norm_is_exact_to_float64; done
	$(if $(filter-out baseline,$(ISA)),$(SANITIZER_ENV) $(BIN)/pytest -q -n auto $(SANITIZED_TESTS) \
	  tests/formats/test_formats.py::test_threads_and_instruction_sets_give_the_same_bits)

# The parallel loop under ThreadSanitizer, in the baseline's kernels: tests in which threads share the work, but none whose
# own threads race. Python ends with an error if anything was reported.
THREADS_ENV = PYTHONPATH=$(abspath $(SANITIZED)) LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)"
sanitize-threads: ISA := baseline
sanitize-threads: $(VENV)/installed
	g++ -c -fPIC -fvisibility=hidden -fsanitize=thread tests/support/gomp_parallel.cpp -o build/gomp_parallel.o
	$(call build_sanitized,-fsanitize=thread -g1,$(abspath build/gomp_parallel.o))
	cd build && $(THREADS_ENV) $(abspath $(BIN))/python -c '$(is_sanitized)'
	$(THREADS_ENV) $(BIN)/pytest -q -s $(SANITIZED_TESTS) tests/rules/test_bitwise.py::test_thread_count \
	  tests/one_pass/test_one_pass.py::test_bits_do_not_depend_on_threads_or_isa \
	  tests/formats/test_formats_codec.py \
	  tests/formats/test_formats.py::test_threads_and_instruction_sets_give_the_same_bits \
	  tests/lists/test_functional.py::test_pieces_from_several_threads_have_the_bits_of_the_whole \
	  tests/lists/test_functional.py::test_grad_norm_of_any_kinds_with_any_threads \
	  tests/step/test_threads.py::test_two_optimizers_in_two_threads \
	  tests/step/test_threads.py::test_many_small_optimizers_in_many_threads

# A million steps of each optimizer among surgery, or of those in NAMES: twenty minutes to an hour.
STEPS ?= 1000000
soak: $(VENV)/installed
	GLIBC_TUNABLES=glibc.malloc.tcache_count=0 PYTHONPATH=tests $(BIN)/python -m endurance.soak --steps $(STEPS) $(NAMES)

# Random programs: N of them, 500 from each seed, SEED the first. A failing seed alone: `make fuzz SEED=17`.
N ?= 500
SEED ?= 0
fuzz: $(VENV)/installed
	FUZZ_N=$(N) FUZZ_SEED=$(SEED) $(BIN)/pytest -q -s tests/endurance/test_fuzz.py
