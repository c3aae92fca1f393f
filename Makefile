# Two commands: `make demo` and `make test`; `make docs` builds the site. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/pocketsize
DEMO   := demo

.PHONY: demo test check docs bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[llamacpp,transformers,data,docs,dev]'
	touch $@

demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(RUN) fetch sample:smollm2-135m
	$(RUN) shrink sample:smollm2-135m --fit 80MB -o $(DEMO)
	$(RUN) verify $(DEMO)
	$(RUN) chat $(DEMO) --prompt 'Why is the sky blue? Answer in one sentence.' --tokens 60
	@echo "The page that shows what was kept: $(DEMO)/report.html"

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md mkdocs.yml docs examples src tests benchmarks
	$(BIN)/python -m benchmarks.tables --check
	$(BIN)/python -m docs.generate --check

docs: $(VENV)/ready
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m docs.check_site

bench: $(VENV)/ready
	$(BIN)/python benchmarks/file-size/run.py
	$(BIN)/python benchmarks/three-quarters/run.py
	$(BIN)/python benchmarks/killed/run.py
	$(BIN)/python benchmarks/memory/run.py
	$(BIN)/python benchmarks/scaling/run.py
	$(BIN)/python benchmarks/floor/run.py
	$(BIN)/python benchmarks/plan/run.py
	$(BIN)/python benchmarks/gpu/run.py
	$(BIN)/python benchmarks/ablation/run.py
	$(BIN)/python benchmarks/peers-gptq/run.py
	$(BIN)/python benchmarks/peers-encoder/run.py
	$(BIN)/python benchmarks/peers-quant/run.py
	$(BIN)/python benchmarks/peers-best/run.py
	$(BIN)/python benchmarks/readers/run.py
	$(BIN)/python benchmarks/rotations/run.py
	$(BIN)/python benchmarks/gptaq/run.py
	$(BIN)/python benchmarks/cache/run.py
	$(BIN)/python benchmarks/w8a8/run.py
	$(BIN)/python benchmarks/students/run.py
	$(BIN)/python benchmarks/distillation/run.py
	$(BIN)/python benchmarks/teaching/run.py
	$(BIN)/python benchmarks/teaching-classes/run.py
	$(BIN)/python benchmarks/embedder/run.py
	$(BIN)/python benchmarks/early-exits/run.py
	$(BIN)/python benchmarks/recovery/run.py
	$(BIN)/python benchmarks/training-speed/run.py
	$(BIN)/python benchmarks/kquants/run.py
	$(BIN)/python benchmarks/pruning/run.py
	$(BIN)/python benchmarks/pruning-structured/run.py
	$(BIN)/python benchmarks/pruning-movement/run.py
	$(BIN)/python benchmarks/pruning-runtime/run.py
	$(BIN)/python benchmarks/windows/run.py

clean:
	rm -rf $(VENV) $(DEMO) site build dist
